"""Shared by the tests: the repository's root on the path, one thread per process, and how scripts are started."""

import functools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from forkserver import Forks

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
torch.set_num_threads(1)                          # pytest -n 2 has a process for each core
# the tests describe the CPU path: the toy recipe, whatever card the machine has, and no network
ENV = os.environ | dict(CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', PYTHONPATH='', OMP_NUM_THREADS='1')


forks, first = functools.cache(lambda: Forks(ENV)), threading.Lock()


def start(*command, cwd=ROOT, ranks=0, timeout=900, env=(), fork=True):
    """Runs a script of the repository as a user would; returns the finished process with its output as text. Without ranks it
    is a fork of a process that has the libraries imported already (forkserver.py), but for --help and fork=False, which are true starts."""
    launch, command = [sys.executable], [*map(str, command)]
    if fork and not ranks and '--help' not in command and sys.platform == 'linux':
        with first:
            server = forks()
        return server.run(command, cwd, ENV | dict(env), timeout)
    if ranks:
        launch += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
        launch += ['--'] if '--n' in command else []       # torchrun takes a script's --n for a prefix of its own --nnodes
    return subprocess.run([*launch, *command], cwd=cwd, env=ENV | dict(env), text=True, capture_output=True, timeout=timeout)


@pytest.fixture(scope='session')
def toy():
    """model.Base of the toy SDXL."""
    import model
    return model.Base(ROOT / 'assets/toy/sdxl')
