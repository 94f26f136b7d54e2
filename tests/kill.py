"""
Kills training runs at random moments, also while they save, starts the same command again each
time, and compares the final weights and optimiser moments with those of a run that nobody touched.
On the toy, CPU.

    python tests/kill.py                      # 20 kills of each stage
    python tests/kill.py --ranks 2 --stages 1 --kills 5
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
p = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
flag = p.add_argument
flag('--stages', type=int, nargs='+', default=[1, 2], help='which stages')
flag('--kills', type=int, default=20, help='kills of each stage')
flag('--term', action='store_true', help='every second kill is a SIGTERM: save and leave')
flag('--iters', type=int, default=30, help='iterations of a run')
flag('--save_every', type=int, default=1,
     help='iterations between saves; 1: a large part of the time is saving')
flag('--ranks', type=int, default=1, help='under torchrun; 1: a plain process')
flag('--seed', type=int, default=0, help='of the moments')
flag('--out', default='out/kill', help='folder for the runs')
args = p.parse_args()
ENV = os.environ | dict(
    CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', OMP_NUM_THREADS='1')

def begin(stage, out):
    """Starts a run, or the same command again; its output is added to a file beside its folder."""
    launch = []
    if args.ranks > 1:
        launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={args.ranks}']
    flags = dict(
        recipe='toy', iters=args.iters, save_every=args.save_every, batch=2, micro=1, warmup=0,
        cooldown=0, sample_every=0, log_every=1, workers=1, out=out)
    if stage == 2:
        flags |= dict(init='assets/toy/student', eval_every=0, critic_warmup=2, rl_ratio=2)
    words = [str(x) for name, value in flags.items() for x in (f'--{name}', value)]
    with open(f'{out}.txt', 'a') as log:
        return subprocess.Popen(
            [sys.executable, *launch, f'train_stage{stage}.py', *words], cwd=ROOT, env=ENV,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

def processes(out):
    """Process ids of a run: those with its folder on their command line."""
    found = []
    for file in Path('/proc').glob('[0-9]*/cmdline'):
        with contextlib.suppress(OSError):
            if f'\0--out\0{out}\0' in file.read_text():
                found.append(int(file.parent.name))
    return found

def children(pid):
    with contextlib.suppress(OSError):
        return [int(x) for x in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    return []

def saved(out):
    """The iteration of the last save."""
    states = out.glob('state-' + '[0-9]' * 7)
    return max((int(state.name.removeprefix('state-')) for state in states), default=0)

def state(out):
    """All weights and moments at the end, whichever rank wrote them."""
    tensors = {}
    for file in (out / f'state-{args.iters:07d}').glob('*.safetensors'):
        tensors |= load_file(file)
    return tensors

def await_the_moment(process, out, before):
    """A third of the kills comes anywhere from the first import on, a third in the loop, a third in
    the middle of a save."""
    kind, until = moments.randrange(3), time.time() + 600
    target = min(args.iters - 1, before + moments.randrange(1, 3))
    if kind == 0:
        time.sleep(moments.uniform(0, 12))
    while kind and process.poll() is None and time.time() < until:
        if kind == 1 and saved(out) >= target:
            break
        if kind == 2 and saved(out) >= target - 1 and list(out.glob('*.tmp')):
            break
        time.sleep(.005)
    time.sleep(moments.uniform(0, 1 if kind == 1 else .2))

def kill_one(process, out, how):
    """A plain process; under torchrun all at once, torchrun alone, or one
    rank. Those that were spared end by themselves. Returns 'killed of all' and the exit code."""
    found = processes(out)
    victims = found
    if args.ranks > 1:
        ranks = children(process.pid) or found
        victims = [found, [process.pid], [moments.choice(ranks)]][moments.randrange(3)]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)
    code = process.wait()
    while processes(out):
        time.sleep(.1)
    return f'{len(victims)} of {len(found)}', code

def last_line(out):
    """'7/30' of the last line of the log."""
    lines = Path(f'{out}.txt').read_text().splitlines()
    lines = [line.split()[0] for line in lines if '/' in line[:12] and 's/it' in line]
    return lines[-1] if lines else ''

moments = random.Random(args.seed)
failed = False
for stage in args.stages:
    calm, out = (Path(args.out).resolve() / f'stage{stage}-{name}' for name in ('calm', 'killed'))
    for folder in (calm, out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        Path(f'{folder}.txt').unlink(missing_ok=True)
    if begin(stage, calm).wait():
        sys.exit(f'error: the run without kills failed, see {calm}.txt')
    print('| kill | by | processes | saved before | log line before | left half-written |\n'
          '|---|---|---|---|---|---|', flush=True)
    kills = 0
    while kills < args.kills:
        process, before = begin(stage, out), saved(out)
        await_the_moment(process, out, before)
        if process.poll() is not None:                       # it was done before the kill came
            if process.returncode:
                sys.exit(f'error: a run failed, see {out}.txt')
            print('|  | none: it had finished; from the beginning again | | | | |', flush=True)
            shutil.rmtree(out)
            continue
        how = signal.SIGTERM if args.term and kills % 2 == 0 else signal.SIGKILL
        victims, code = kill_one(process, out, how)
        kills += 1
        by = f'SIGTERM, left with {code}' if how == signal.SIGTERM else 'SIGKILL'
        half = ' '.join(f.name for f in out.glob('*.tmp*')) if out.exists() else ''
        print(f'| {kills} | {by} | {victims} | {saved(out)} | {last_line(out)} | {half} |',
              flush=True)
        if saved(out) == args.iters:             # nothing is left to be killed: from the beginning
            shutil.rmtree(out)
    code = begin(stage, out).wait()
    if code:
        sys.exit(f'error: the run after the last kill failed with {code}, see {out}.txt')
    a, b = state(calm), state(out)
    off = [k for k in a if k not in b or not torch.equal(a[k], b[k])]
    verdict = 'all equal bit for bit'
    if off or a.keys() != b.keys():
        verdict = f'{len(off)} DIFFER, e.g. {off[:3]}'
        failed = True
    print(f'stage {stage}: {kills} kills, {len(a)} tensors of weights and moments after '
          f'{args.iters} iterations: {verdict}', flush=True)
sys.exit(failed)
