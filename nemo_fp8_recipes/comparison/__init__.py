"""Training recipes side by side: the same model, data and seed, a run directory each, and one table.

`plan` decides what is run and where, `execute` runs it, `outcome` reads what the runs left, `table` shows it.
Imports no torch: the runs are processes of their own.
"""

from nemo_fp8_recipes.comparison.execute import execute
from nemo_fp8_recipes.comparison.outcome import Comparison, Outcome, compare
from nemo_fp8_recipes.comparison.plan import Plan, Variant, make_plan

__all__ = ["Comparison", "Outcome", "Plan", "Variant", "compare", "execute", "make_plan"]
