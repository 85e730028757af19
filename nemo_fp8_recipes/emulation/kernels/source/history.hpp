// Windows of delayed scaling's amax histories. Reference: `history_windows` of telemetry/probes/delayed.py.
#pragma once

#include <cstdint>
#include <vector>

namespace fp8 {

// The windows of `slots`, which are counted over the columns of all histories, float[length][widths[i]] each. An
// update rolled a history unless the amax it brought was 0: then what it dropped is the first entry, and the last
// one is in the history already. Row 0 is no entry.
inline void history_windows(int64_t modules, const float* const* histories, const int64_t* widths, int64_t length,
                            const float* oldest, const float* last, int64_t count, const int64_t* slots,
                            float* out) {
  struct Column {
    const float* first;
    int64_t stride;
  };
  std::vector<Column> columns;
  for (int64_t module = 0; module < modules; ++module)
    for (int64_t column = 0; column < widths[module]; ++column)
      columns.push_back({histories[module] + column, widths[module]});
  for (int64_t i = 0; i < count; ++i, out += length) {
    const int64_t slot = slots[i];
    const auto [first, stride] = columns[slot];
    const bool rolled = last[slot] != 0;
    float* entry = out;
    if (rolled && length > 1) *entry++ = oldest[slot];
    const int64_t end = rolled ? length - 1 : length;
    for (int64_t row = 1; row < end; ++row) *entry++ = first[row * stride];
    *entry = last[slot];
  }
}

}  // namespace fp8
