"""Gloo ranks forked from a process that has imported everything."""

import os
import tempfile
import traceback

import torch
import torch.distributed as dist


def fork_ranks(function, ranks):
    """`function(rank)` in each rank of a process group, and only once all have ended well."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(ranks):
            if not (child := os.fork()):
                code = 1
                try:
                    torch.set_num_threads(1)
                    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
                    function(rank)
                    dist.destroy_process_group()
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    # gloo's threads live on in FSDP2's caches, and abort a process whose interpreter ends
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == [0] * ranks, codes
