"""
What a long run meets: signals, kills, full disks, hung and differing ranks, NaNs, several
machines. Twenty kills of either stage: python tests/kill.py

    pytest tests/test_reliability.py
"""

import contextlib
import json
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
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import model as m
from conftest import ENV, ROOT, equal, far_from_one_step, inside, rows, start, stay, weights
from test_files import settings

TINY = ['--recipe', 'toy', '--sample_every', 0, '--log_every', 1, '--iters', 4, '--save_every', 2,
        '--batch', 4, '--micro', 1, '--warmup', 0, '--cooldown', 0, '--workers', 0, '--gan', 'none']
RUN = ['train_stage1.py', *TINY]
SECOND = ['train_stage2.py', *TINY, '--eval_every', 0]

def torchrun(*command, flags=('--standalone',), ranks=2, patience=3):
    """A started torchrun; its output is one stream. It waits `patience` seconds for ranks that do
    not end at once, not 30."""
    launch = ['-m', 'torch.distributed.run', *map(str, flags), f'--nproc_per_node={ranks}']
    return subprocess.Popen(
        [sys.executable, *launch, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=ENV | dict(TORCH_ELASTIC_SHUTDOWN_TIMEOUT=str(patience)))

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
    """And each rank writes about half of the weights and of the moments, none of them twice; the
    student is diffusers' own class."""
    assert not far_from_one_step(weights(two, 4), weights(one, 4), weights(one, 2))
    shares = []
    for rank in range(2):
        tensors = load_file(two / f'state-0000004/rank{rank}.safetensors')
        held = {}
        for key, value in tensors.items():
            kind = key.split('/')[0]
            held[kind] = held.get(kind, 0) + value.nbytes
        shares.append(held)
    whole = {}
    for key, value in weights(one, 4).items():
        kind = key.split('/')[0]
        whole[kind] = whole.get(kind, 0) + value.nbytes
    for kind in whole.keys() - {'student.step', 'fake.step'}:
        assert sum(held[kind] for held in shares) == whole[kind]
        assert .4 < shares[0][kind] / whole[kind] < .6
    a, b = (json.loads((out / 'student/unet/config.json').read_text()) for out in (one, two))
    assert a.pop('_name_or_path') and b.pop('_name_or_path')
    assert a == b
    assert a['_class_name'] == 'UNet2DConditionModel'

def test_killed_under_max_restarts_is_uninterrupted(two, tmp_path):
    """torchrun --max-restarts: rank 1 dies in its first life amid the save at 4, when its file is
    written; both start again from the save at 2, bit for bit the run that nothing happened to. The
    other's end is a sentence. In the second life rank 0 is first, when torchrun's store still has
    the addresses of the dead."""
    script = hooked(tmp_path, '''
if os.environ['TORCHELASTIC_RESTART_COUNT'] != '0' and rank == 1:
    time.sleep(4)
crc = m.crc
def killed(file):
    if 'state-0000004.tmp' in str(file) and rank == 1:
        if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
            os.kill(os.getpid(), signal.SIGKILL)
    return crc(file)
m.crc = killed
''')
    run = torchrun(
        script, *RUN, '--out', tmp_path / 'run', flags=['--standalone', '--max-restarts=1'])
    said = ended(run)
    assert run.returncode == 0, said[-3000:]
    assert 'state-0000002, of iteration 2' in said
    assert 'error: rank 0: another rank is lost' in said
    assert 'model.py", line' not in said
    for it in (2, 4):
        assert equal(weights(two, it), weights(tmp_path / 'run', it))
    assert [row['iteration'] for row in rows(tmp_path / 'run')] == [1, 2, 3, 4]

def one_rank(env, work, *args):
    os.environ |= env
    # a fork's pool of threads is made anew by the first call, and two at once abort it
    torch.set_num_threads(1)
    m.launch(1)
    work(int(env['RANK']), *args)
    torch.distributed.destroy_process_group()

def ranks(world, work, *args, here=0):
    """Runs work(rank, *args) on so many ranks, `here` of them on a machine, each in the group that
    m.launch makes; returns their exit codes. They are forks of a process that has only imported: of
    this one, with the libraries as earlier tests left them, three crashed in CI."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['tests.conftest', 'test_reliability'])
    all_of_them = []
    for rank in range(world):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=here or world,
                   MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        env = {key: str(value) for key, value in env.items()}
        all_of_them.append(context.Process(target=one_rank, args=(env, work, *args)))
        all_of_them[-1].start()
    for process in all_of_them:
        process.join(100)
    return [process.exitcode for process in all_of_them]

def two_steps(rank, folder, begin, end):
    """Training of a network whose weights are sharded and of one that is whole, from `begin` to
    `end`, two micro-batches in an iteration. Every rank sees the same, so the mean is exact."""
    torch.manual_seed(begin)
    nets = {name: nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 2))
            for name in ('student', 'heads')}
    many = torch.distributed.get_world_size() > 1
    called = [m.parallel(net, torch.device('cpu'), shard=many and name == 'student')
              for name, net in nets.items()]
    named = {name: m.trained(net) for name, net in nets.items()}
    opts = {name: torch.optim.AdamW(w.values(), lr=.1) for name, w in named.items()}
    state = m.find_state(folder, settings())
    assert m.iteration_of(state) == begin
    m.load_state(state, named, opts)
    for it in range(begin, end):
        for k in range(2):
            x = torch.randn(4, 5, generator=m.generator(it, k))
            sum(net(x).square().mean() for net in called).backward()
        for name, net in nets.items():
            m.update(opts[name], net)
    m.save_state(folder, end, settings(), named, opts, False, lambda: None)

def test_a_state_fits_any_number_of_ranks(tmp_path):
    """Small networks, two steps in each of four lives: of 2 ranks; of 4, more than the last layer
    has rows; of 4 on two machines, where shares are repeated; of 1. As one process in one life."""
    lives = [(2, 2, 0, 2), (4, 4, 2, 4), (4, 2, 4, 6), (1, 1, 6, 8)]
    for folder, lives in ('many', lives), ('one', [(1, 1, 0, 8)]):
        (tmp_path / folder).mkdir()
        for world, here, begin, end in lives:
            codes = ranks(world, two_steps, tmp_path / folder, begin, end, here=here)
            assert codes == [0] * world
            files = (tmp_path / folder / f'state-{end:07d}').glob('*.safetensors')
            assert len(list(files)) == world
    alone, many = weights(tmp_path / 'one', 8), weights(tmp_path / 'many', 8)
    assert len(alone) == 2 * (6 + 18)
    assert alone.keys() == many.keys()
    for key, value in alone.items():
        assert torch.allclose(many[key], value, rtol=1e-5, atol=1e-7), key

def sharded(rank, folder):
    """What must hold of networks under FSDP2, on the toy UNet; bf16 gathers, as on CUDA."""
    base = m.load_base(ROOT / 'assets/toy/sdxl')
    net = base.trainable()
    first = {k: w.detach().clone() for k, w in net.named_parameters()}
    policy = m.MixedPrecisionPolicy
    m.MixedPrecisionPolicy = lambda dtype, *rest, **how: policy(torch.bfloat16, *rest, **how)
    base.autocast = lambda: torch.autocast('cpu', torch.bfloat16)
    m.parallel(net, base.device, shard=True)
    m.parallel(base.teacher, base.device, shard=True)
    times = []
    net.time_proj.register_forward_hook(lambda layer, given, made: times.extend(given[0].tolist()))
    x, t = torch.randn(2, *base.latent_shape), torch.tensor([999., 749.])
    y = base.encode(['a', 'b'])

    def all_sharded():
        return all(isinstance(w, m.DTensor) for w in net.parameters())

    # after each kind of pass the parameters are the shares again, which are trained and saved
    with torch.no_grad():
        base.predict(net, x, t, y)
    assert all_sharded()
    base.predict(net, x, t, y).square().mean().backward()
    assert all_sharded()
    leaf = x.clone().requires_grad_()
    maps = base.features(net, leaf, t, y)
    torch.autograd.grad(maps[-1].mean(), [leaf])
    assert all_sharded()
    with torch.no_grad():
        again = base.features(net, x, t, y)
    assert all_sharded()
    assert torch.equal(again[-1], maps[-1])
    assert set(times) == {999., 749.}
    # gradients and moments are shares as well, and the coupling goes from share to share
    opt = torch.optim.AdamW(net.parameters(), lr=0., fused=True)
    assert m.update(opt, net) > 0
    assert all(isinstance(v['exp_avg'], m.DTensor) for v in opt.state.values())
    # a frozen network's list of what ran does not grow
    for _ in range(3):
        with torch.no_grad():
            base.predict(base.teacher, x, t, y)
    assert not base.teacher._get_fsdp_state()._comm_ctx.post_forward_order
    copied = m.frozen_copy(base, net)
    with torch.no_grad():
        assert torch.equal(base.predict(copied, x, t, y), base.predict(net, x, t, y))
    # whole tensors, as they were, come back on rank 0, and go into the shares again
    found = m.whole_on_rank_0(net.state_dict(), torch.float32)
    assert (rank == 0) == bool(found)
    assert all(torch.equal(found[k], first[k]) for k in found)
    m.load_trained(net, {k: w + 1 for k, w in first.items()})
    found = m.whole_on_rank_0(net.state_dict(), torch.float32)
    assert all(torch.equal(found[k], first[k] + 1) for k in found)

def test_sharded_networks(tmp_path):
    assert ranks(3, sharded, tmp_path) == [0, 0, 0]

def test_what_waits_in_main_memory_is_the_same(one, tmp_path):
    """--cpu_offload: FSDP2 in a group of one, and a state that the run without it goes on from."""
    done = inside(*RUN, '--cpu_offload', '--iters', 2, '--out', tmp_path / 'run')
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(isinstance(w, m.DTensor) for w in done.page['weights']['student'].values())
    assert not far_from_one_step(weights(tmp_path / 'run', 2), weights(one, 2), weights(one, 4))
    done = inside(*RUN, '--out', tmp_path / 'run')
    assert done.returncode == 0, done.stderr[-2000:]
    assert not far_from_one_step(weights(tmp_path / 'run', 4), weights(one, 4), weights(one, 2))

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
    for out, how in ('plain', []), ('compiled', ['--compile', '--grad_checkpointing']):
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

def test_two_ranks_are_one_with_a_latent_gan_compiled(tmp_path):
    """Here the discriminator's gradient enters the fake score past the call of the whole network,
    and half of a forward pass is all there is. Sharded networks are compiled layer by layer."""
    flags = ['train_stage1.py', *TINY[:-2], '--recipe', 'toy-dmd2', '--ttur', 2, '--iters', 3]
    done = inside(*flags, '--out', tmp_path / 'one')
    assert done.returncode == 0, done.stderr[-2000:]
    script = hooked(tmp_path, '''
compiled, count = torch.compile, []
def with_eager(*args, **kwargs):
    count.append(1)
    return compiled(*args, **kwargs, backend='eager')
torch.compile = with_eager
def meets(it, normals):
    assert len(count) > 40
''')
    run = torchrun(script, *flags, '--compile', '--out', tmp_path / 'two')
    said = ended(run)
    assert run.returncode == 0, said[-3000:]
    one, two = weights(tmp_path / 'one', 3), weights(tmp_path / 'two', 3)
    assert not far_from_one_step(two, one, weights(tmp_path / 'one', 2))

def test_stage_2_on_two_ranks_is_one_with_whole_networks(one, tmp_path):
    """Sharded reference, grids and evaluations on all ranks alike, of a number of prompts that they
    cannot share evenly."""
    flags = [*SECOND[:-2], '--init', one, '--rl_ratio', 1, '--critic_warmup', 0, '--eval_every', 4,
             '--eval_n', 3, '--sample_every', 4, '--candidates', 2]
    done = inside(*flags, '--out', tmp_path / 'one')
    assert done.returncode == 0, done.stderr[-2000:]
    run = torchrun(*flags, '--out', tmp_path / 'two')
    said = ended(run)
    assert run.returncode == 0, said[-3000:]
    a, b = weights(tmp_path / 'one', 4), weights(tmp_path / 'two', 4)
    assert not far_from_one_step(b, a, weights(tmp_path / 'one', 2))
    for x, y in zip(rows(tmp_path / 'one', 'eval.jsonl'), rows(tmp_path / 'two', 'eval.jsonl')):
        assert x == pytest.approx(y, rel=1e-3)
    for name in ('samples-0000000.png', 'samples-0000004.png'):
        pictures = [np.asarray(Image.open(tmp_path / out / name), float) for out in ('one', 'two')]
        assert np.abs(pictures[0] - pictures[1]).mean() < .1
    assert rows(tmp_path / 'two')[1]['rl/ratio'] == pytest.approx(1, abs=1e-2)

# --------------------------------------------------------------------------------------------------
# signals and kills

def test_sigterm_saves_and_four_ranks_go_on(one, tmp_path):
    """SIGTERM to torchrun, which hands it to its ranks: they end the iteration, save and leave;
    four ranks finish the run."""
    out = tmp_path / 'run'
    command = [*RUN, '--out', out, '--save_every', 100]
    # an iteration of sharded networks and a save take longer than 3 s on a busy machine
    run = torchrun(*command, patience=60)
    for line in run.stdout:
        if line.startswith('    1/4'):
            break
    run.send_signal(signal.SIGTERM)
    said = ended(run)
    state, = m.states_of(out)
    it = m.iteration_of(state)
    assert it in (1, 2, 3)
    assert f'told to stop after iteration {it}, saved' in said
    assert 'exitcode' not in said                                # the ranks themselves left with 0
    assert not errors(said)
    again = torchrun(*command, ranks=4)
    said = ended(again)
    assert again.returncode == 0, said[-3000:]
    assert f', of iteration {it}' in said
    assert not far_from_one_step(weights(out, 4), weights(one, 4), weights(one, 2))

@pytest.mark.parametrize('ranks', [1, 2])
def test_ctrl_c(ranks, tmp_path):
    """Before the first iteration one sentence, amid one it is what SIGTERM is, and a second ends at
    once; torchrun has a traceback of its own, and repeats the first to its ranks."""
    # a shell's background job ignores Ctrl-C, and so would all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out, slow = tmp_path / 'run', tmp_path / 'slow'
    script = hooked(tmp_path, f'''
def meets(it, normals):
    if it and os.path.exists({str(slow)!r}):
        os.remove({str(slow)!r})
        print('asleep', flush=True)
        time.sleep(30)
''')
    for line, code, says in (
            ('plan', 130, 'told to stop; what was saved is whole'), ('    1/4', 0, 'saved in'),
            ('asleep', 130, 'ended at once'))[:4 - ranks]:
        if line == 'asleep':
            slow.touch()
        command = [script, *RUN, '--save_every', 100, '--out', out]
        if ranks == 2:
            run = torchrun(*command, patience=60)
        else:
            run = subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=ROOT, text=True, env=ENV,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        before = next(x for x in run.stdout if x.startswith(line))
        run.send_signal(signal.SIGINT)
        if line == 'asleep':
            time.sleep(4)
            run.send_signal(signal.SIGINT)
        said = before + ended(run)
        assert says in said, said[-3000:]
        assert ranks == 2 or run.returncode == code and 'Traceback' not in said
        assert not errors(said) or line == 'asleep'
    state, = m.states_of(out)
    assert m.iteration_of(state) in (1, 2)

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
    assert 'told to stop after iteration 2, saved' in said
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
    done = inside(*RUN, *flags, '--force', '--save_every', 3, '--out', out)
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
    Then one weight of rank 1's heads changes in its last bit: the save at 4 refuses, and names
    them. (Of a sharded weight there is one.)"""
    script = hooked(tmp_path, '''
def meets(it, normals):
    if it == 1 and rank == 1:
        normals[0] = float('nan')
save_state = m.save_state
def saved(out, it, args, weights, *rest):
    if it == 4 and rank == 1:
        w = next(iter(weights['heads'].values())).data.view(-1)
        w[0] = torch.nextafter(w[0], torch.tensor(9.))
    save_state(out, it, args, weights, *rest)
m.save_state = saved
''')
    run = torchrun(script, *RUN, '--gan', 'latent', '--out', tmp_path / 'run')
    said = ended(run)
    line, = errors(said)
    assert 'the weights of heads on rank 1 differ' in line
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
