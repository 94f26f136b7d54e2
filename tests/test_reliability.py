"""
What a long run meets: signals, kills, full disks, hung and differing ranks, NaNs, dying data workers, several machines.
pytest tests/test_reliability.py; twenty kills of either stage: python tests/kill.py
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import model as m
from conftest import ENV, ROOT, start
from test_files import folder_of_pictures, pieces, save

TINY = ['--recipe', 'toy', '--sample_every', 0, '--log_every', 1, '--iters', 4, '--save_every', 2, '--batch', 4, '--micro', 1,
        '--warmup', 0, '--cooldown', 0, '--workers', 0, '--gan', 'none']
RUN = ['train_stage1.py', *TINY]


def weights(out, it=4):
    """Every network's weights and every optimiser's moments of a saved state."""
    return {f'{f.name}:{k}': v for f in (out / f'state-{it:07d}').glob('*.safetensors') for k, v in load_file(f).items()}


def differences(a, b):
    """Distance of two states relative to their size: of the weights, of the moments."""
    assert a.keys() == b.keys() and len(a) > 100
    parts = [torch.cat([(x[k] - y.get(k, 0)).flatten() for k in a if ('.opt.' in k) == moments and not k.endswith('.step')])
             for moments in (False, True) for x, y in ((a, b), (a, {}))]
    return [(parts[i].norm() / parts[i + 1].norm()).item() for i in (0, 2)]


def equal(a, b):
    return a.keys() == b.keys() and len(a) > 100 and all(torch.equal(a[k], b[k]) for k in a)


def rows(out):
    return [json.loads(x) for x in (out / 'log.jsonl').read_text().splitlines()]


def torchrun(*command, flags=('--standalone',), ranks=2):
    """A started torchrun; its output is one stream. One thread each: torchrun itself sees to that only where there are several
    ranks, and another number of threads rounds otherwise."""
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', *map(str, flags), f'--nproc_per_node={ranks}',
                             *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=ENV | dict(TORCH_ELASTIC_SHUTDOWN_TIMEOUT='3' if 'hooked.py' in str(command[0]) else '60'))


def hooked(folder, code):
    """A script that plants something at the start of iterations, meets(d, it) in `code`, and then is the script it is given."""
    (folder / 'hooked.py').write_text(f'''
import os, runpy, shutil, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import model as m
rank, rates, parts = int(os.environ.get('RANK', 0)), m.Distillation.learning_rates, m.Distillation.parts
def learning_rates(d, it, **other):
    meets(d, it)
    rates(d, it, **other)
m.Distillation.learning_rates = learning_rates
def meets(d, it):
    pass
def poison(when):                                    # NaNs in the first micro-batch of rank 1
    def poisoned(d, it, *a, **k):
        out = parts(d, it, *a, **k)
        if rank == 1 and when(it):
            out[0].eps.fill_(float('nan'))
        return out
    m.Distillation.parts = poisoned
{code}
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
    """Two agents of torchrun with a rank each, as on two machines; optimisers not sharded."""
    out = tmp_path_factory.mktemp('two') / 'run'
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    agents = [torchrun(*RUN, '--no-shard', '--out', out, ranks=1, flags=[
        '--nnodes=2', f'--node_rank={k}', '--master_addr=127.0.0.1', f'--master_port={port}']) for k in range(2)]
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    return out


# ------------------------------------------------------------------------------------------ the same result, any way

def test_two_machines_are_one_process(one, two):
    off = differences(weights(one), weights(two))
    step = differences(weights(one, 2), weights(two))                                      # what two iterations do
    assert off[0] < step[0] / 100 and off[1] < step[1] / 100


def test_sharded_and_killed_under_max_restarts_is_unsharded(two, tmp_path):
    """torchrun --max-restarts: rank 1 dies in iteration 3 of its first life; all start again from the save at 2, of sharded
    moments. Bit for bit the run without shards or kills; and each rank held about half of the moments."""
    script = hooked(tmp_path, '''
def meets(d, it):
    if it == 3:
        held = [sum(v.nbytes for s in o.optim.state.values() for v in s.values()) for o in d.opts.values()]
        with open(__file__ + f'.{rank}', 'a') as file:                     # what ranks print may share a line
            print(*(h / sum(2 * w.nbytes for g in o.param_groups for w in g['params']) for h, o in zip(held, d.opts.values())),
                  file=file)
        if rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
            os.kill(os.getpid(), signal.SIGKILL)
''')
    run = torchrun(script, *RUN, '--out', tmp_path / 'run', flags=['--standalone', '--max-restarts=3'])
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 0 and 'from iteration 2' in said, said[-3000:]
    shares = [float(x) for rank in range(2) for x in Path(f'{script}.{rank}').read_text().split()]
    assert len(shares) == 8 and all(.4 < share < .6 for share in shares)
    assert 'rank 0 lost another rank in iteration 3' in said and 'model.py", line' not in said
    assert equal(weights(two), weights(tmp_path / 'run')) and equal(weights(two, 2), weights(tmp_path / 'run', 2))
    assert [row['iteration'] for row in rows(tmp_path / 'run')] == [1, 2, 3, 4]


def test_a_state_fits_any_number_of_ranks_sharded_or_not(tmp_path):
    """A small network, two steps in each of three lives: 2 ranks sharded, 4 sharded, 1. Every rank sees the same batch, so the
    mean over them is exact, and the end is bit for bit that of one process in one life."""
    (tmp_path / 'hooked.py').write_text(f'''
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import model as m
folder, start, end, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(os.environ.get('WORLD_SIZE', 1))
torch.manual_seed(start)
if world > 1:
    torch.distributed.init_process_group('gloo')
net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3), torch.nn.Linear(3, 2))
make = dict(lr=.1) | (dict(optimizer_class=torch.optim.AdamW) if world > 1 else dict())
opt = (m.ZeroRedundancyOptimizer if world > 1 else torch.optim.AdamW)(net.parameters(), **make)
if start:
    assert m.load_state(folder, dict(student=net), dict(student=opt), dict(model='a')) == start
ddp = m.DDP(net, gradient_as_bucket_view=True) if world > 1 else net
for it in range(start, end):
    for last in (False, True):
        with ddp.no_sync() if world > 1 and not last else torch.enable_grad():
            ddp(torch.randn(4, 5, generator=m.generator(it, last))).square().mean().backward()
    m.update(opt, net)
moments = dict([('student.opt', m.whole_moments(opt))])
if int(os.environ.get('RANK', 0)) == 0:
    m.save_state(folder, end, dict(student=net), moments, dict(model='a'))
''')
    (tmp_path / 'many').mkdir(), (tmp_path / 'one').mkdir()
    for k, ranks in enumerate((2, 4, 1)):
        run = torchrun(tmp_path / 'hooked.py', tmp_path / 'many', 2 * k, 2 * k + 2, ranks=ranks)
        said = run.communicate(timeout=200)[0]
        assert run.returncode == 0, said[-3000:]
    done = start(tmp_path / 'hooked.py', tmp_path / 'one', 0, 6)
    assert done.returncode == 0, done.stderr[-2000:]
    one, many = weights(tmp_path / 'one', 6), weights(tmp_path / 'many', 6)
    assert one.keys() == many.keys() and len(one) == 6 + 18 and all(torch.equal(one[k], many[k]) for k in one)


def test_compiled_is_the_same_and_compiles_once(tmp_path):
    """--compile in stage 2, which runs all of stage 1 as well: every network is one graph (fullgraph), the first cycle of one
    distillation and two preference updates compiles all there is, and the weights are those of the run without. The graphs are
    run as they are (backend eager): what a compiler makes of them is torch's to test, and would take minutes."""
    script = hooked(tmp_path, '''
import functools
from torch._dynamo.utils import counters
torch.compile = functools.partial(torch.compile, backend='eager')
def meets(d, it):
    print('graphs', it, counters['stats']['unique_graphs'], sum(counters['graph_break'].values()), flush=True)
''')
    flags = ['--init', 'assets/toy/student', '--rl_ratio', 2, '--critic_warmup', 0, '--eval_every', 0, '--sample_every', 0,
             '--log_every', 1, '--iters', 6, '--save_every', 6, '--batch', 2, '--micro', 1, '--warmup', 0, '--workers', 0]
    for out, how in ('plain', []), ('compiled', ['--compile', '--checkpointing']):
        done = start(script, 'train_stage2.py', *flags, *how, '--out', tmp_path / out)
        assert done.returncode == 0, done.stderr[-2000:]
    graphs = [[int(x) for x in line.split()[1:]] for line in done.stdout.splitlines() if line.startswith('graphs')]
    assert [it for it, *_ in graphs] == list(range(6)) and graphs[0][1] == 0
    assert 6 <= graphs[3][1] <= 8 and {n for it, n, _ in graphs[3:]} == {graphs[3][1]} and not any(b for *_, b in graphs)
    off, step = (differences(weights(tmp_path / 'plain', 6), x) for x in (
        weights(tmp_path / 'compiled', 6), {k: v * 0 for k, v in weights(tmp_path / 'plain', 6).items()}))
    assert off[0] < 1e-6 and off[1] < 1e-5 and step[0] > .9


# ------------------------------------------------------------------------------------------------ signals and kills

def test_sigterm_saves_and_four_ranks_go_on(one, tmp_path):
    """SIGTERM to torchrun, which hands it to its ranks: they end the iteration, save and leave; four ranks finish the run."""
    out = tmp_path / 'run'
    command = [*RUN, '--out', out, '--save_every', 100]
    run = torchrun(*command)
    for line in run.stdout:
        if line.startswith('    1/4'):
            break
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=120)[0]
    state, = m.states_of(out)
    it = int(state.name[6:])
    assert it in (1, 2, 3) and f'told to stop (SIGTERM) after iteration {it}, saved' in said, said
    assert 'exitcode' not in said and 'error: ' not in said                                # the ranks themselves left with 0
    again = torchrun(*command, ranks=4)
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0 and f'from iteration {it}' in said, said[-3000:]
    off, step = differences(weights(one), weights(out)), differences(weights(one, 2), weights(out))
    assert off[0] < step[0] / 100 and off[1] < step[1] / 100


def test_killed_at_random_moments(tmp_path):
    """SIGTERM and SIGKILL in turn, then the same command again: tests/kill.py, shortened."""
    done = start('tests/kill.py', '--stages', 1, '--kills', 2, '--iters', 5, '--save_every', 1, '--term', '--out', tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert 'stage 1: 2 kills' in done.stdout and 'equal bit for bit' in done.stdout


# --------------------------------------------------------------------------------------------------------- the saves

def test_a_damaged_state_is_passed_over(tmp_path, capsys):
    nets, opts = pieces()
    for it in (10, 20, 30):
        save(tmp_path, it, nets, opts)
    file = tmp_path / 'state-0000030/student.opt.safetensors'
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 1                                                              # one bit: the file still loads
    file.write_bytes(whole)
    others, states = pieces(1)
    assert m.load_state(tmp_path, others, states, dict(model='a', batch=4)) == 20
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and 'state-0000030 is damaged (student.opt.safetensors' in said
    assert torch.equal(others['student'].weight, nets['student'].weight)
    assert {f.name for f in tmp_path.iterdir()} == {'state-0000020', 'state-0000030.damaged'}
    save(tmp_path, 25, nets, opts)
    for state in m.states_of(tmp_path):
        (state / 'student.safetensors').unlink()
    with pytest.raises(SystemExit) as stop:
        m.load_state(tmp_path, others, states, dict(model='a', batch=4))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and 'state-0000020' in error and 'state-0000025' in error


def test_files_reach_the_disk_before_their_names(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda f: order.append(os.readlink(f'/proc/self/fd/{f}')) or fsync(f))
    monkeypatch.setattr(os, 'replace', lambda a, b: order.append('rename') or replace(a, b))
    save(tmp_path, 10, *pieces())
    folder = tmp_path / 'state-0000010'
    tmp = f'{folder}.tmp'
    assert {*order[:order.index('rename')]} == {tmp, *(f'{tmp}/{f.name}' for f in folder.iterdir())}
    assert order[-1] == str(tmp_path)


def test_no_room(one, tmp_path):
    """A save that finds no room is skipped, by the flag, and the run goes on; where it was the last, the run fails."""
    script = hooked(tmp_path, '''
import types
shutil.disk_usage = lambda folder: types.SimpleNamespace(free=10 ** 7)
''')
    out = tmp_path / 'run'
    shutil.copytree(one, out)
    shutil.rmtree(out / 'state-0000004')
    before = {f: f.read_bytes() for f in (out / 'state-0000002').iterdir()}
    done = start(script, *RUN, '--save_every', 3, '--disk_full', 'skip', '--out', out)
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert 'the save at iteration 3 failed' in done.stdout and 'going on' in done.stdout and '    4/4' in done.stdout
    assert f'--out {out}: the save at iteration 4' in done.stderr and '0.01 GB are free' in done.stderr
    assert float(done.stderr.split(' GB missing')[0].split()[-1]) > .05
    assert [f.name for f in m.states_of(out)] == ['state-0000002'] and before == {f: f.read_bytes() for f in before}


def test_a_full_disk_in_the_middle_of_a_save(one, tmp_path):
    """A real one of 140 MB, where a second state does not fit; the script believes that it does until the write fails."""
    small = tmp_path / 'small'
    small.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=140m', 'tmpfs', small], capture_output=True).returncode:
        pytest.skip('mounting a small disk needs root')
    try:
        shutil.copytree(one / 'state-0000002', small / 'run/state-0000002')
        before = {f: f.read_bytes() for f in (small / 'run/state-0000002').iterdir()}
        script = hooked(tmp_path, '''
import types
usage, calls = shutil.disk_usage, []
shutil.disk_usage = lambda folder: usage(folder) if calls else calls.append(1) or types.SimpleNamespace(free=10 ** 12)
''')
        done = start(script, *RUN, '--save_every', 3, '--out', small / 'run')
        assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
        assert f'--out {small}/run: the save at iteration 3 failed' in done.stderr and 'o space left' in done.stderr
        assert float(done.stderr.split(' GB missing')[0].split()[-1]) > .01
        assert before == {f: f.read_bytes() for f in before} and len(m.states_of(small / 'run')) == 1
        assert not list((small / 'run').glob('*.tmp'))
    finally:
        subprocess.run(['umount', small])


# ------------------------------------------------------------------------------------------- one rank goes its own way

def test_a_nan_on_one_rank_is_dropped_on_both_and_differing_weights_stop(tmp_path):
    """NaNs in one of rank 1's two micro-batches of iteration 1; the save at 2 finds equal weights. Then one weight of rank 1
    changes in its last bit: the save at 4 refuses, and names it."""
    script = hooked(tmp_path, '''
poison(lambda it: it == 1)
def meets(d, it):
    if rank == 1 and it == 3:
        w = next(d.fake.parameters()).data.view(-1)
        w[0] = torch.nextafter(w[0], torch.tensor(9.))
''')
    run = torchrun(script, *RUN, '--no-shard', '--out', tmp_path / 'run')    # sharded, the weight's owner would send it anew
    said = run.communicate(timeout=300)[0]
    errors = [line for line in said.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and 'the weights of fake on rank 1 differ' in errors[0] and 'iteration 4' in errors[0], said[-3000:]
    assert run.returncode and [f.name for f in m.states_of(tmp_path / 'run')] == ['state-0000002']
    assert [row['dropped'] for row in rows(tmp_path / 'run')] == [0, 1, 1, 1]
    assert [np.isnan(row['fake']) for row in rows(tmp_path / 'run')] == [False, True, False, False]


def test_ten_nans_in_a_row_stop_stage_2(tmp_path):
    """Both kinds of iteration; the last save is good: finite, and rank 0 alone never saw a NaN of its own."""
    script = hooked(tmp_path, 'poison(lambda it: it >= 2)')
    run = torchrun(script, 'train_stage2.py', *TINY, '--iters', 30, '--save_every', 4, '--init', 'assets/toy/student',
                   '--rl_ratio', 1, '--critic_warmup', 1, '--eval_every', 0, '--out', tmp_path / 'run')
    said = run.communicate(timeout=300)[0]
    errors = [line for line in said.splitlines() if line.startswith('error: ')]
    assert run.returncode and len(errors) == 1 and '10 iterations in a row' in errors[0] and 'up to 11' in errors[0], said[-3000:]
    assert [f.name for f in m.states_of(tmp_path / 'run')] == ['state-0000004', 'state-0000008']
    a, b = weights(tmp_path / 'run', 4), weights(tmp_path / 'run', 8)
    assert equal(a, b) and all(v.isfinite().all() for v in a.values())


def short_iterations(folder, happens):
    """Two ranks under torchrun whose iterations are nothing but a collective, and what `happens` at the second one: its output."""
    (folder / 'hooked.py').write_text(f'''
import argparse, os, signal, sys, time, torch
sys.path.insert(0, {str(ROOT)!r})
import model as m
p = argparse.ArgumentParser()
m.training_flags(p, '')
p.add_argument('--out')
args = p.parse_args()
run = m.Run(args)
def in_model(it):
    if it == 2:
        {happens}
    torch.distributed.all_reduce(torch.ones(3))
in_model.__code__ = in_model.__code__.replace(co_filename=m.__file__)
for it in range(100):
    if run.told_to_stop(it):
        break
    in_model(it)
    time.sleep(.1)
print(f'rank {{run.rank}} ended at {{it}}', flush=True)
run.close(it)
''')
    run = torchrun(folder / 'hooked.py', '--timeout', .1, '--out', folder, *(x for k in (
        'batch=2 micro=1 iters=200 save_every=1 log_every=1 sample_every=0 warmup=0 cooldown=0 student_lr=0 fake_lr=0 heads_lr=0 '
        'gan_weight=0 cfg=1').split() for x in ('--' + k).split('=')))
    return run.communicate(timeout=200)[0], run.returncode


@pytest.mark.parametrize('stopped', [1, 0])
def test_a_hung_rank_is_named(stopped, tmp_path):
    said, code = short_iterations(tmp_path, f'run.rank == {stopped} and os.kill(os.getpid(), signal.SIGSTOP)')
    errors = [line for line in said.splitlines() if line.startswith('error: ')]
    assert code and len(errors) == 1 and 'model.py", line' not in said, said[-3000:]
    assert 'iteration 2 has taken more than --timeout 0.1 minutes' in errors[0]
    assert f'no answer: rank {stopped}' in errors[0] and f'(in_model): rank {1 - stopped}' in errors[0]


def test_a_signal_to_one_rank_ends_both_after_the_same_iteration(tmp_path):
    said, code = short_iterations(tmp_path, 'run.rank == 1 and os.kill(os.getpid(), signal.SIGTERM)')
    assert code == 0 and 'rank 0 ended at 3' in said and 'rank 1 ended at 3' in said and 'after iteration 3' in said, said[-3000:]


def test_ranks_end_with_their_torchrun(tmp_path):
    """Left alone they would save into the folder of the run that is started in their place. Who notices second may notice that
    the first is gone."""
    said, code = short_iterations(tmp_path, 'run.rank == 0 and os.kill(os.getppid(), signal.SIGKILL)')
    ends = [f'rank {rank}{end}' in said for rank in range(2) for end in (': torchrun is gone', ' lost another rank')]
    assert code == -signal.SIGKILL and ends[0] + ends[1] == ends[2] + ends[3] == 1 and ends[0] + ends[2], said[-3000:]
    assert ' ended at' not in said


# -------------------------------------------------------------------------------------------------------------- data

def data(folder):
    return m.Pictures(str(folder), '', 'image', 'text', 64, 0)


def test_a_data_worker_may_die(tmp_path, capfd, monkeypatch):
    """SIGKILL to a worker: others decode the same batches. Workers that die again and again end the run with a sentence."""
    import multiprocessing
    import torch.utils.data.dataloader as loading
    monkeypatch.setattr(loading._MultiProcessingDataLoaderIter._try_get_data, '__defaults__', (.5,))        # seconds, else 5
    pictures = data(folder_of_pictures(tmp_path / 'a', 12))
    calm = [b['text'] for b in pictures.batches(4, 1, 2, range(40), 0)]
    found = []
    for rows in pictures.batches(4, 1, 2, range(40), 2):
        found.append(rows['text'])
        if len(found) == 5:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(1)                                                       # no exception here, out of nowhere
        if len(found) == 20:                                                    # a job queue's, which all processes get
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGTERM)
    assert found == calm and 'rank 1: a data worker died at iteration' in capfd.readouterr().out
    pictures._text = lambda row: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(SystemExit) as stop:
        list(pictures.batches(4, 1, 2, range(40), 1))
    error = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and f'--data {tmp_path}/a: its worker processes died' in error[-1] and '--workers' in error[-1]


@pytest.mark.parametrize('workers', [0, 2])
def test_files_that_disappear(workers, tmp_path, capsys):
    folder = folder_of_pictures(tmp_path / 'a', 12)
    pictures, skipped = data(folder), 0
    batches = pictures.batches(4, 0, 1, range(400), workers)
    next(batches)
    for k in range(4):
        (folder / f'{k}.png').unlink()
    for _ in range(20):
        rows = next(batches)
        skipped += rows['skipped'].sum().item()
    assert skipped > 5 and len(rows['text']) == 4
    shutil.rmtree(folder)
    with pytest.raises(SystemExit) as stop:
        list(batches)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and f'--data {folder}: 12 pictures in a row' in error
