"""Threads and forked workers: neither disturbs what the others compute, record or draw."""

from __future__ import annotations

from tests.support.processes import run_emulated


def test_threads_compute_what_one_thread_does() -> None:
    run_emulated(
        """
        import threading
        import torch
        import transformer_engine.pytorch as te
        import transformer_engine_torch as tex
        from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

        fmt = te.DType.kFloat8E4M3
        makers = [
            lambda: te.Float8CurrentScalingQuantizer(fmt, device="cuda"),
            lambda: te.MXFP8Quantizer(fmt),
            lambda: te.Float8BlockQuantizer(fmt, rowwise=True, columnwise=True),
            lambda: NVFP4Quantizer(),
        ]

        def work(maker, seed):
            generator = torch.Generator("cuda").manual_seed(seed)
            x = torch.randn(256, 256, generator=generator)
            w = torch.randn(128, 256, generator=generator)
            tag = te.DType.kFloat32
            return tex.generic_gemm(
                tex.quantize(w, maker()), True, tex.quantize(x, maker()), False, None, None, tag, None, tag,
                False, None, False, torch.empty(0), 0, False, True,
            )[0]

        jobs = [(maker, seed) for seed in range(6) for maker in makers]
        expected = [work(*job) for job in jobs]
        found = [None] * len(jobs)
        errors = []
        start = threading.Barrier(4)

        def thread(first):
            try:
                start.wait()
                for number in range(first, len(jobs), 4):
                    found[number] = work(*jobs[number])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=thread, args=(first,)) for first in (0, 1, 2, 3)]
        with emulation.trace() as observed:
            for one in threads:
                one.start()
            for one in threads:
                one.join()
        assert not errors, errors
        assert all(torch.equal(here, there) for here, there in zip(found, expected, strict=True))
        # A trace sees the whole device: all threads' work (a backward pass runs in threads of its own).
        assert len(observed.gemms) == len(jobs)
        assert len(observed.quantizations) == 2 * len(jobs)
        """,
        device="b200",
    )


def test_forked_workers_have_the_device_and_leave_the_parents_alone() -> None:
    run_emulated(
        """
        import os
        import torch
        import transformer_engine.pytorch as te
        import transformer_engine_torch as tex

        quantizer = te.MXFP8Quantizer(te.DType.kFloat8E4M3)

        class Samples(torch.utils.data.Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, index):
                assert emulation.label() == "emulated b200"
                x = torch.full((32, 32), float(index + 1), device="cuda")
                assert x.is_cuda
                return os.getpid(), tex.quantize(x, quantizer).dequantize()

        torch.manual_seed(3)
        expected = [Samples()[index][1] for index in range(8)]
        before = torch.cuda.get_rng_state()
        with emulation.trace() as observed:
            loader = torch.utils.data.DataLoader(
                Samples(), batch_size=2, num_workers=2, multiprocessing_context="fork", pin_memory=True,
                generator=torch.Generator("cuda"),
            )
            batches = list(loader)
        workers = {int(pid) for pids, _ in batches for pid in pids}
        assert len(workers) == 2 and os.getpid() not in workers
        assert torch.equal(torch.cat([x for _, x in batches]), torch.stack(expected))
        assert torch.equal(torch.cuda.get_rng_state(), before), "workers drew from the parent's generator"
        assert observed.quantizations == [], "a worker's records are its own"

        pid = os.fork()
        if pid == 0:  # a child that takes its device away
            try:
                emulation.uninstall()
                os._exit(int(torch.cuda.is_available() or emulation.active() is not None))
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert torch.cuda.is_available() and emulation.label() == "emulated b200"
        assert tex.quantize(torch.ones(32, 32), quantizer).dequantize().eq(1).all()
        """,
        device="b200",
    )
