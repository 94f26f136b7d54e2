"""
Shared by the tests: the repository's root on the path, one thread a process, how scripts are
started, and what a run leaves in its folder.
"""

import contextlib
import faulthandler
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
# the tests describe the CPU path: the toy recipe, whatever card the machine has, and no network
os.environ |= dict(CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1',
                   OMP_NUM_THREADS='1')
ENV = os.environ | dict(PYTHONPATH='')

import pytest                                                                          # noqa: E402
import torch                                                                           # noqa: E402
import torch.distributed as dist                                                       # noqa: E402
from safetensors.torch import load_file                                                # noqa: E402

torch.set_num_threads(1)                                 # pytest -n 2 has a process for each core

# --------------------------------------------------------------------------------------------------
# starting scripts

def start(*command, cwd=ROOT, ranks=0, timeout=900, env=()):
    """Runs a script as a user would, under torchrun where there are ranks; returns the finished
    process with its output as text."""
    launch = [sys.executable]
    if ranks:
        launch += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
        launch += ['--'] if '--n' in command else []     # torchrun takes it for its own --nnodes
    return subprocess.run(
        [*launch, *map(str, command)], cwd=cwd, env=ENV | dict(env), text=True, capture_output=True,
        timeout=timeout)

@contextlib.contextmanager
def output_in(out, err):
    """What is printed, by Python or by a library's C++, goes into two open files."""
    kept = os.dup(1), os.dup(2)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    try:
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
              warnings.catch_warnings()):
            # pytest would keep them for its summary
            warnings.showwarning = show
            for kind in (DeprecationWarning, PendingDeprecationWarning):
                warnings.simplefilter('ignore', kind)
            yield
    finally:
        out.flush()
        err.flush()
        for fd, copy in enumerate(kept, 1):
            os.dup2(copy, fd)
            os.close(copy)

def show(message, category, filename, lineno, file=None, line=None):
    """warnings.showwarning as Python has it."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

PID, EXIT = os.getpid(), os._exit

def leave(code):
    """In the place of os._exit, which would end the tests with the script. A fork ends as
    always."""
    if os.getpid() != PID:
        EXIT(code)
    raise SystemExit(code)

def inside(script, *flags, env=(), cwd=ROOT):
    """Runs a script in the test's own process, which has imported its libraries already: returncode
    and output as of `start`, and its global names as page. What it changed in the process, a
    signal handler or a process group, is undone."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as after:
        for name, value in dict(env).items():
            patch.setenv(name, value)
        patch.chdir(cwd)
        patch.setattr(sys, 'argv', [str(script), *map(str, flags)])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        patch.setattr(os, '_exit', leave)
        for number in (signal.SIGTERM, signal.SIGINT):
            after.callback(signal.signal, number, signal.getsignal(number))
        after.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        after.callback(stay)
        out = after.enter_context(tempfile.TemporaryFile('w+'))
        err = after.enter_context(tempfile.TemporaryFile('w+'))
        environment = dict(os.environ)
        with output_in(out, err):
            code, page = ended(str(Path(cwd, script)))
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        out.seek(0)
        err.seek(0)
        return SimpleNamespace(returncode=code, stdout=out.read(), stderr=err.read(), page=page)

def ended(script):
    """The exit code of a script that is run here, and the names on its page."""
    try:
        try:
            return 0, runpy.run_path(script, run_name='__main__')
        except Exception:
            sys.excepthook(*sys.exc_info())
            return 1, {}
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1, {}
        page = {}
        for frame, _ in traceback.walk_tb(stop.__traceback__):
            if frame.f_code.co_filename == script:
                page = dict(frame.f_globals)
        return stop.code or 0, page

def stay():
    """Undoes what m.launch and a training loop do to a process."""
    faulthandler.cancel_dump_traceback_later()
    if dist.is_initialized():
        dist.destroy_process_group()

refused = inside                        # where the script is to say no, in one sentence and code 2

# --------------------------------------------------------------------------------------------------
# what a run leaves

def weights(out, it):
    """Every network's weights and every optimiser's moments of a saved state, one dict by the keys
    of its files without their rows, put together from what each rank wrote."""
    pieces = {}
    for file in (Path(out) / f'state-{it:07d}').glob('*.safetensors'):
        for key, value in load_file(file).items():
            name, row = key.split('@')
            pieces.setdefault(name, []).append((int(row), value))
    found = {}
    for name, parts in pieces.items():
        values = [value for _, value in sorted(parts, key=lambda part: part[0])]
        found[name] = torch.cat(values) if values[0].ndim else values[0]
    return found

def rows(out, name='log.jsonl'):
    """The lines of a run's log."""
    return [json.loads(line) for line in (Path(out) / name).read_text().splitlines()]

def equal(a, b):
    """Whether two states are the same to the last bit."""
    return a.keys() == b.keys() and len(a) > 20 and all(torch.equal(a[k], b[k]) for k in a)

def differences(a, b):
    """The distance of two states, {'student.weight': .01...}: of each network's weights, and of
    each kind of its moments relative to their size."""
    assert a.keys() == b.keys() and a
    found = {}
    for kind in sorted({k.split('/')[0] for k in a}):
        names = [k for k in a if k.split('/')[0] == kind]
        x, y = (torch.cat([s[k].flatten().double() for k in names]) for s in (a, b))
        size = 1 if kind.endswith('.weight') else y.norm().item() or 1
        found[kind] = (x - y).norm().item() / size
    return found

def far_from_one_step(a, b, before):
    """Where the states a and b are further apart than rounding: weights by a hundredth of what b's
    moved by since the state `before`, moments by a hundredth of their size. {} where nowhere."""
    off, moved = differences(a, b), differences(b, before)
    found = {}
    for kind, distance in off.items():
        least = moved[kind] if kind.endswith('.weight') else 1
        if distance > least / 100:
            found[kind] = distance, least
    return found

def listing(folder):
    """{file: its bytes} of all files in a folder."""
    files = sorted(f for f in Path(folder).rglob('*') if f.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}

# --------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def toy():
    """model.Base of the toy SDXL."""
    import model
    return model.load_base(ROOT / 'assets/toy/sdxl')

@contextlib.contextmanager
def alone():
    """A process group of one, as a training script has it."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, '_exit', leave)
        yield
    dist.destroy_process_group()

@pytest.fixture
def group():
    with alone():
        yield
