"""
What a long run meets: signals, kills, full disks, hung and differing ranks, NaNs, dead data
workers, several machines. Twenty kills of either stage: python tests/kill.py

    pytest tests/test_reliability.py
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.distributed.optim import ZeroRedundancyOptimizer

import model as m
from conftest import ENV, ROOT, equal, far_from_one_step, inside, rows, start, stay, weights
from test_files import settings

TINY = ['--recipe', 'toy', '--sample_every', 0, '--log_every', 1, '--iters', 4, '--save_every', 2,
        '--batch', 4, '--micro', 1, '--warmup', 0, '--cooldown', 0, '--workers', 0, '--gan', 'none']
RUN = ['train_stage1.py', *TINY]
SECOND = ['train_stage2.py', *TINY, '--eval_every', 0]

def torchrun(*command, flags=('--standalone',), ranks=2):
    """A started torchrun; its output is one stream. It waits 3 seconds for ranks that do not end at
    once, not 30."""
    launch = ['-m', 'torch.distributed.run', *map(str, flags), f'--nproc_per_node={ranks}']
    return subprocess.Popen(
        [sys.executable, *launch, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=ENV | dict(TORCH_ELASTIC_SHUTDOWN_TIMEOUT='3'))

def ended(run, timeout=200):
    """What a started torchrun has printed when it and its ranks end, or are ended."""
    try:
        return run.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        folder = os.fsencode(run.args[run.args.index('--out') + 1])
        for file in Path('/proc').glob('[0-9]*/cmdline'):
            with contextlib.suppress(OSError):
                if folder in file.read_bytes().split(b'\0'):
                    os.kill(int(file.parent.name), signal.SIGKILL)
        return run.communicate()[0]

def errors(said):
    return [line for line in said.splitlines() if line.startswith('error: ')]

def hooked(folder, code):
    """A script that plants something in the ranks of another and then is that one. `code` may
    define meets(it, normals), which is called when iteration `it` draws its random numbers, a plain
    function that both pages call once in an iteration, and may replace anything of m."""
    (folder / 'hooked.py').write_text(f'''
import multiprocessing, os, runpy, signal, sys, time, torch
sys.path.insert(0, {str(ROOT)!r})
import model as m
rank, draw = int(os.environ.get('RANK', 0)), m.draw
def meets(it, normals):
    pass
{code}
def drawn(seed, it, samples, shape):
    normals, uniforms = draw(seed, it, samples, shape)
    meets(it, normals)
    return normals, uniforms
m.draw = drawn
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name='__main__')
''')
    return folder / 'hooked.py'

@pytest.fixture(scope='session')
def one(tmp_path_factory):
    """One process, uninterrupted."""
    out = tmp_path_factory.mktemp('one') / 'run'
    done = start(*RUN, '--out', out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out

@pytest.fixture(scope='session')
def two(tmp_path_factory):
    """Two agents of torchrun with a rank each, as on two machines, uninterrupted."""
    out = tmp_path_factory.mktemp('two') / 'run'
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    agents = []
    for k in range(2):
        flags = ['--nnodes=2', f'--node_rank={k}', '--master_addr=127.0.0.1',
                 f'--master_port={port}']
        agents.append(torchrun(*RUN, '--out', out, ranks=1, flags=flags))
    said = [ended(agent) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    return out

# --------------------------------------------------------------------------------------------------
# the same result, any way

def test_two_machines_are_one_process(one, two):
    """And each rank holds about half of the optimisers' moments, and only rank 0 the weights."""
    assert not far_from_one_step(weights(two, 4), weights(one, 4), weights(one, 2))
    shares = []
    for rank in range(2):
        tensors = load_file(two / f'state-0000004/rank{rank}.safetensors')
        assert any('.weight/' in key for key in tensors) == (rank == 0)
        shares.append({net: sum(v.nbytes for k, v in tensors.items() if k.startswith(f'{net}.exp'))
                       for net in ('student', 'fake')})
    for net, held in shares[0].items():
        assert .4 < held / (held + shares[1][net]) < .6

def test_killed_under_max_restarts_is_uninterrupted(two, tmp_path):
    """torchrun --max-restarts: rank 1 dies in iteration 3 of its first life; both start again from
    the save at 2, bit for bit the run that nothing happened to. The other's end is a sentence. In
    the second life rank 0 is first, when torchrun's store still has the addresses of the dead."""
    script = hooked(tmp_path, '''
if os.environ['TORCHELASTIC_RESTART_COUNT'] != '0' and rank == 1:
    time.sleep(4)
def meets(it, normals):
    if it == 3 and rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
        os.kill(os.getpid(), signal.SIGKILL)
''')
    run = torchrun(
        script, *RUN, '--out', tmp_path / 'run', flags=['--standalone', '--max-restarts=1'])
    said = ended(run)
    assert run.returncode == 0, said[-3000:]
    assert 'from iteration 2' in said
    assert 'error: rank 0: another rank is lost' in said
    assert 'model.py", line' not in said
    for it in (2, 4):
        assert equal(weights(two, it), weights(tmp_path / 'run', it))
    assert [row['iteration'] for row in rows(tmp_path / 'run')] == [1, 2, 3, 4]

def ranks(world, work, *args):
    """Runs work(rank, *args) on so many ranks, forks of this process, each in the group that
    m.launch makes; returns their exit codes."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]

    def begin(rank):
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                           MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        m.launch(1)
        work(rank, *args)
        torch.distributed.destroy_process_group()

    context = multiprocessing.get_context('fork')
    all_of_them = [context.Process(target=begin, args=(rank,)) for rank in range(world)]
    for process in all_of_them:
        process.start()
    for process in all_of_them:
        process.join(100)
    return [process.exitcode for process in all_of_them]

def two_steps(rank, folder, begin, end):
    """Training from `begin` to `end`, two micro-batches in an iteration. Every rank sees the same,
    so the mean over them is exact."""
    torch.manual_seed(begin)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 2))
    named = dict(student=m.trained(net))
    opts = dict(student=ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=.1))
    state = m.find_state(folder, settings())
    assert m.iteration_of(state) == begin
    m.load_state(state, named, opts)
    ddp = m.parallel(net, torch.device('cpu'))
    for it in range(begin, end):
        for last in (False, True):
            x = torch.randn(4, 5, generator=m.generator(it, last))
            with m.sync(ddp, last):
                ddp(x).square().mean().backward()
        m.update(opts['student'], net)
    m.save_state(folder, end, settings(), named, opts, False, lambda: None)

def test_a_state_fits_any_number_of_ranks(tmp_path):
    """A small network, two steps in each of three lives, of 2 ranks, of 4, of 1: bit for bit one
    process in one life."""
    for folder, lives in ('many', [(2, 0, 2), (4, 2, 4), (1, 4, 6)]), ('one', [(1, 0, 6)]):
        (tmp_path / folder).mkdir()
        for world, begin, end in lives:
            assert ranks(world, two_steps, tmp_path / folder, begin, end) == [0] * world
            files = (tmp_path / folder / f'state-{end:07d}').glob('*.safetensors')
            assert len(list(files)) == world
    alone, many = weights(tmp_path / 'one', 6), weights(tmp_path / 'many', 6)
    assert len(alone) == 6 + 18
    assert equal(alone, many)

def test_compiled_is_the_same_and_compiles_once(one, tmp_path, monkeypatch):
    """--compile in stage 2, which runs all of stage 1 as well: every network is one graph
    (fullgraph), the first cycle of one distillation and one preference update compiles all there
    is, and the weights are those of the run without. The graphs are run as they are (backend
    eager): what a compiler makes of them is torch's to test, and would take minutes."""
    draw, compiled, graphs = m.draw, torch.compile, []

    def drawn(seed, it, samples, shape):
        broken = sum(counters['graph_break'].values())
        graphs.append((it, counters['stats']['unique_graphs'], broken))
        return draw(seed, it, samples, shape)

    def with_eager(*args, **kwargs):
        return compiled(*args, **kwargs, backend='eager')

    monkeypatch.setattr(m, 'draw', drawn)
    monkeypatch.setattr(torch, 'compile', with_eager)
    torch._dynamo.reset()
    counters.clear()
    flags = ['--init', one, '--batch', 2, '--gan', 'pixel', '--rl_ratio', 1, '--critic_warmup', 0]
    for out, how in ('plain', []), ('compiled', ['--compile', '--checkpointing']):
        graphs.clear()
        done = inside(*SECOND, *flags, *how, '--out', tmp_path / out)
        assert done.returncode == 0, done.stderr[-2000:]
    assert [it for it, *_ in graphs] == [0, *range(4)]                   # first the grid's noise
    found = [n for _, n, _ in graphs[1:]]
    assert found[0] == 0
    assert 6 <= found[2] <= 8
    assert found[2] == found[3]
    assert not any(broken for *_, broken in graphs)
    plain = weights(tmp_path / 'plain', 4)
    assert not far_from_one_step(
        weights(tmp_path / 'compiled', 4), plain, weights(tmp_path / 'plain', 2))

# --------------------------------------------------------------------------------------------------
# signals and kills

def test_sigterm_saves_and_four_ranks_go_on(one, tmp_path):
    """SIGTERM to torchrun, which hands it to its ranks: they end the iteration, save and leave;
    four ranks finish the run."""
    out = tmp_path / 'run'
    command = [*RUN, '--out', out, '--save_every', 100]
    run = torchrun(*command)
    for line in run.stdout:
        if line.startswith('    1/4'):
            break
    run.send_signal(signal.SIGTERM)
    said = ended(run)
    state, = m.states_of(out)
    it = m.iteration_of(state)
    assert it in (1, 2, 3)
    assert f'told to stop (SIGTERM) after iteration {it}, saved' in said
    assert 'exitcode' not in said                                # the ranks themselves left with 0
    assert not errors(said)
    again = torchrun(*command, ranks=4)
    said = ended(again)
    assert again.returncode == 0, said[-3000:]
    assert f'from iteration {it}' in said
    assert not far_from_one_step(weights(out, 4), weights(one, 4), weights(one, 2))

def test_a_signal_to_one_rank_ends_both_after_the_same_iteration(tmp_path):
    """It comes in iteration 0; both leave when that is done, saved, and with code 0."""
    script = hooked(tmp_path, '''
def meets(it, normals):
    if it == 1 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
''')
    run = torchrun(script, *RUN, '--save_every', 100, '--out', tmp_path / 'run')
    said = ended(run)
    assert run.returncode == 0, said[-3000:]
    assert 'told to stop (SIGTERM) after iteration 2, saved' in said
    assert [state.name for state in m.states_of(tmp_path / 'run')] == ['state-0000002']

def test_killed_at_random_moments(tmp_path):
    """SIGTERM and SIGKILL in turn, then the same command again: tests/kill.py, shortened."""
    done = start('tests/kill.py', '--stages', 1, '--kills', 2, '--iters', 4, '--save_every', 1,
                 '--term', '--out', tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert 'stage 1: 2 kills' in done.stdout
    assert 'equal bit for bit' in done.stdout

# --------------------------------------------------------------------------------------------------
# disks

def before_and_after(out, *flags):
    """RUN in a folder that holds a state at 2, which must stay as it is."""
    before = {f: f.read_bytes() for f in (out / 'state-0000002').iterdir()}
    done = inside(*RUN, *flags, '--save_every', 3, '--out', out)
    assert [f.name for f in m.states_of(out)] == ['state-0000002']
    assert before == {f: f.read_bytes() for f in (out / 'state-0000002').iterdir()}
    assert not list(out.glob('*.tmp'))
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1, done.stderr
    return done

def test_no_room(one, tmp_path, monkeypatch):
    """A save that finds no room is skipped, by the flag, and the run goes on; where it was the
    last, the run fails."""
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: types.SimpleNamespace(free=10 ** 7))
    out = tmp_path / 'run'
    out.mkdir()
    (out / 'state-0000002').symlink_to(one / 'state-0000002')
    done = before_and_after(out, '--disk_full', 'skip')
    assert 'the save at iteration 3 failed' in done.stdout
    assert 'going on' in done.stdout
    assert '    4/4' in done.stdout
    assert f'--out {out}: the save at iteration 4' in done.stderr
    assert '0.01 GB are free' in done.stderr
    assert float(done.stderr.split(' GB missing')[0].split()[-1]) > .05

def test_a_full_disk_in_the_middle_of_a_save(one, tmp_path, monkeypatch):
    """A real one of 140 MB, where a second state does not fit; the script believes that it does
    until the write fails."""
    small = tmp_path / 'small'
    small.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=140m', 'tmpfs', small]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting a small disk needs root')
    calls, usage = [], shutil.disk_usage

    def believed(folder):
        calls.append(folder)
        return types.SimpleNamespace(free=10 ** 12) if len(calls) == 1 else usage(folder)

    try:
        shutil.copytree(one / 'state-0000002', small / 'run/state-0000002')
        monkeypatch.setattr(shutil, 'disk_usage', believed)
        done = before_and_after(small / 'run')
        assert f'--out {small}/run: the save at iteration 3 failed' in done.stderr
        assert 'o space left' in done.stderr
        assert float(done.stderr.split(' GB missing')[0].split()[-1]) > .01
    finally:
        subprocess.run(['umount', '-l', small])             # a mapped file may still be held

# --------------------------------------------------------------------------------------------------
# one rank goes its own way

def test_a_nan_on_one_rank_is_dropped_on_both_and_differing_weights_stop(tmp_path):
    """NaNs in one of rank 1's two micro-batches of iteration 1; the save at 2 finds equal weights.
    Then one weight of rank 1 changes in its last bit: the save at 4 refuses, and names it."""
    script = hooked(tmp_path, '''
def meets(it, normals):
    if it == 1 and rank == 1:
        normals[0] = float('nan')
save_state = m.save_state
def saved(out, it, args, weights, *rest):
    if it == 4 and rank == 1:
        w = next(iter(weights['fake'].values())).data.view(-1)
        w[0] = torch.nextafter(w[0], torch.tensor(9.))
    save_state(out, it, args, weights, *rest)
m.save_state = saved
''')
    run = torchrun(script, *RUN, '--out', tmp_path / 'run')
    said = ended(run)
    line, = errors(said)
    assert 'the weights of fake on rank 1 differ' in line
    assert 'iteration 4' in line
    assert run.returncode
    assert [state.name for state in m.states_of(tmp_path / 'run')] == ['state-0000002']
    assert [row['dropped'] for row in rows(tmp_path / 'run')] == [0, 1, 1, 1]
    unsound = [np.isnan(row['fake']) for row in rows(tmp_path / 'run')]
    assert unsound == [False, True, False, False]

def test_ten_nans_in_a_row_stop_stage_2(tmp_path, monkeypatch):
    """Both kinds of iteration count. The last save is good: finite, and what it was at the first
    NaN."""
    draw = m.draw

    def drawn(seed, it, samples, shape):
        normals, uniforms = draw(seed, it, samples, shape)
        return normals * (float('nan') if it >= 2 else 1), uniforms

    monkeypatch.setattr(m, 'draw', drawn)
    done = inside(
        *SECOND, '--init', 'assets/toy/student', '--iters', 30, '--save_every', 4, '--batch', 1,
        '--rl_ratio', 1, '--critic_warmup', 1, '--out', tmp_path / 'run')
    assert done.returncode == 2
    line, = errors(done.stderr)
    assert '10 iterations in a row' in line
    assert 'up to 11' in line
    names = [state.name for state in m.states_of(tmp_path / 'run')]
    assert names == ['state-0000004', 'state-0000008']
    a, b = weights(tmp_path / 'run', 4), weights(tmp_path / 'run', 8)
    assert equal(a, b)
    assert all(v.isfinite().all() for v in a.values())

def test_a_hung_rank_ends_the_run(tmp_path):
    """Rank 1 is stopped; rank 0 waits no longer than --timeout, says where it stands, and torchrun
    ends all, after half a minute in which the test does that for it."""
    script = hooked(tmp_path, '''
def meets(it, normals):
    if it == 1 and rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
''')
    run = torchrun(script, *RUN, '--timeout', .2, '--out', tmp_path / 'run')
    said = ''
    for line in run.stdout:
        said += line
        if 'closing signal SIGTERM' in line:                       # which a stopped process ignores
            os.kill(int(line.split('Sending process ')[1].split()[0]), signal.SIGKILL)
    ended(run)
    assert run.returncode, said
    assert said.count('Timeout (0:00:12)!') == 1
    assert 'train_stage1.py", line' in said.split('Timeout (0:00:12)!')[1]

def test_ranks_end_with_their_torchrun(tmp_path):
    """Left alone they would save into the folder of the run that is started in their place."""
    script = hooked(tmp_path, '''
def meets(it, normals):
    if it == 1 and rank == 0:
        print('killed at', time.time(), flush=True)
        os.kill(os.getppid(), signal.SIGKILL)
''')
    run = torchrun(script, *RUN, '--iters', 1000, '--save_every', 1000, '--out', tmp_path / 'run')
    said = ended(run, 120)                                  # the last one to write has closed it
    began = float(said.split('killed at ')[1].split()[0])
    assert run.returncode == -signal.SIGKILL
    assert time.time() - began < 10
    assert not m.states_of(tmp_path / 'run')
