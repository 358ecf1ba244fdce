"""Pagers of a GPU in forked children, and at the end of a process whose copies are still on their way."""

import pytest
from gpu_machine import assert_ends_fine

pytestmark = [pytest.mark.timeout(90)]


def test_a_forked_child_is_told_and_touches_no_device(machine, tmp_path):
    """CUDA does not survive a fork: every call raises, and neither garbage nor exit in the child reach the driver."""
    assert_ends_fine(machine, "a driver that a fork breaks", """
        import gc, os, sys
        import torch
        from chunkft.streaming import Pager

        def in_child(pager):
            calls = [lambda: pager.prefetch(0), lambda: pager.acquire(2), lambda: pager.release(1),
                     lambda: pager.discard(1), lambda: pager.evict(0), pager.flush, lambda: pager.host(3),
                     lambda: pager.state(0), pager.stats, pager.trace, pager.close]
            for call in calls:
                try:
                    call()
                except RuntimeError as error:
                    assert "child" in str(error) and str(os.getpid()) in str(error), error
                else:
                    os._exit(3)

        for options in ({}, {"state_dir": sys.argv[1]}):
            pager = Pager([4096] * 4, device="cuda", **options)
            pager.acquire(0).fill_(1)
            pager.release(0, keep=True)
            held = pager.acquire(1)
            child = os.fork()
            if child == 0:
                in_child(pager)
                del pager
                gc.collect()
                sys.stdout.flush()
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            held.fill_(2)
            pager.release(1)
            pager.flush()
            assert (pager.host(0) == 1).all() and (pager.host(1) == 2).all()
            pager.close()
        print("fine")
        """, tmp_path)  # fmt: skip


def test_workers_of_a_data_loader_do_not_disturb_training(machine):
    """They are forked while state is paged, and end with the optimizer's pager in their memory."""
    assert_ends_fine(machine, "a driver that a fork breaks", """
        import torch
        import chunkft

        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return 24
            def __getitem__(self, index):
                return torch.full((64,), float(index))

        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 8)).cuda()
        optimizer = chunkft.ChunkAdamW(model, lr=1e-3, chunks=2, interval=2, state_device="paged")
        for epoch in range(2):
            for batch in torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=2):
                model(batch.cuda()).square().mean().backward()
                optimizer.step()
        assert optimizer.updates == 12
        optimizer.detach()
        print("fine")
        """)  # fmt: skip


@pytest.mark.parametrize("end", ["pass", "sys.exit(0)", "del pager, optimizer, model"])
def test_a_process_ends_while_loads_are_on_their_way(machine, end):
    """Without a close: copies run into slots and out of page-locked memory that exit is about to give back."""
    assert_ends_fine(machine, "copies beside the host", f"""
        import sys
        import torch
        import chunkft
        from chunkft.streaming import Pager

        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(6))).cuda().bfloat16()
        optimizer = chunkft.ChunkAdamW(model, lr=1e-3, chunks=1, interval=2, residency="stream", page_bytes=1 << 22)
        for _ in range(4):
            model(torch.ones(8, 1024, device="cuda", dtype=torch.bfloat16)).square().mean().backward()
            optimizer.step()
        pager = Pager([64 << 20] * 6, device="cuda", slots=3)
        for page in range(6):
            pager.acquire(page).fill_(page)
            pager.release(page)
        torch.cuda._sleep(int(2e8))
        pager.prefetch(0)
        pager.prefetch(1)
        pager.acquire(2)
        print("fine", flush=True)
        {end}
        """)  # fmt: skip


def test_a_process_that_raises_writes_back_what_was_released(machine, tmp_path):
    assert_ends_fine(machine, "copies beside the host", """
        import subprocess, sys
        program = '''
        import sys
        import torch
        from chunkft.streaming import Pager
        pager = Pager([5000] * 4, device="cuda", state_dir=sys.argv[1])
        page = pager.acquire(1)
        torch.cuda._sleep(int(1e8))
        page.fill_(1)
        pager.release(1, keep=True)
        pager.acquire(2).fill_(2)
        raise ValueError("in the middle")
        '''
        import textwrap
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), sys.argv[1]], capture_output=True,
                              text=True, timeout=60)
        assert done.returncode == 1, done
        assert done.stderr.strip().endswith("ValueError: in the middle"), done.stderr
        from chunkft.streaming import Pager
        with Pager([5000] * 4, state_dir=sys.argv[1], reopen=True) as pager:
            assert [int(pager.host(page)[0]) for page in range(4)] == [0, 1, 0, 0]
        print("fine")
        """, tmp_path)  # fmt: skip
