"""
The real scripts as subprocesses, on the CPU: ranks, micro-batches, resume, export, tables, bad input.
pytest tests/test_scripts.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import ENV, ROOT, start

TRAIN = ['train_stage1.py', '--recipe', 'toy', '--sample_every', 0, '--log_every', 5]


def weights(out, it):
    """Every network's weights and every optimiser's moments of a run's state, one dict."""
    return {f'{f.name}:{k}': v for f in sorted((out / f'state-{it:07d}').glob('*.safetensors'))
            for k, v in load_file(f).items()}


def largest_difference(a, b, kind=''):
    assert a.keys() == b.keys() and a
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a if kind in k)


def train(out, *flags, ranks=0):
    done = start(*TRAIN, '--out', out, *flags, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope='session')
def plain(tmp_path_factory):
    """The uninterrupted single-process run of 20 iterations that the others are compared with."""
    out = tmp_path_factory.mktemp('runs') / 'plain'
    train(out, '--iters', 20, '--save_every', 10, '--sample_every', 20)
    return out


# ------------------------------------------------------------------------------------------------- how scripts are started

@pytest.mark.parametrize('end, code', [
    ('pass', 0), ('sys.exit()', 0), ('sys.exit(3)', 3), ('sys.exit("words")', 1), ('1 / 0', 1), ('os.kill(os.getpid(), 9)', -9)])
def test_a_fork_is_a_start(end, code, tmp_path):
    """What a script sees, prints and leaves, started by forkserver.py and by Python: the same."""
    (tmp_path / 'code').mkdir()
    (tmp_path / 'code/beside.py').write_text('')
    (tmp_path / 'code/x.py').write_text(
        'import atexit, os, sys, threading, beside\n'
        'print(sys.argv, sys.path[0], __name__, __file__, os.getcwd(), os.environ["A"], sys.stdout.encoding)\n'
        'print("an error", file=sys.stderr)\n'
        'atexit.register(print, "at exit")\n'
        'threading.Thread(target=lambda: threading.Event().wait(.1) or print("a thread")).start()\n' + end)
    (tmp_path / 'x.py').symlink_to(tmp_path / 'code/x.py')
    one, two = (start('x.py', '--a', 1, 'b c', cwd=tmp_path, env=dict(A='\u00e4'), fork=f) for f in (True, False))
    assert one.returncode == two.returncode == code and one.stdout == two.stdout
    assert ('a thread\nat exit\n' in one.stdout) == (code >= 0)
    ours = [x for x in one.stderr.splitlines() if 'forkserver.py' not in x and 'exec(' not in x]       # a traceback goes deeper
    assert ours == two.stderr.splitlines()


def test_a_fork_that_hangs_is_killed(tmp_path):
    (tmp_path / 'x.py').write_text('import os, time\nopen("pid", "w").write(str(os.getpid()))\ntime.sleep(60)')
    with pytest.raises(subprocess.TimeoutExpired):
        start(tmp_path / 'x.py', cwd=tmp_path, timeout=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / 'pid').read_text()), 0)


# ------------------------------------------------------------------------------------------- the same result, any way

def test_two_ranks_are_one(plain, tmp_path):
    train(tmp_path / 'run', '--iters', 20, '--micro', 8, ranks=2)
    a, b = weights(plain, 20), weights(tmp_path / 'run', 20)
    assert largest_difference(a, b, 'student.safetensors') < 1e-4
    assert largest_difference(a, b, 'fake.safetensors') < 1e-4
    assert largest_difference(a, b, 'heads.safetensors') < 1e-4


def test_micro_batch_does_not_matter(plain, tmp_path):
    train(tmp_path / 'run', '--iters', 20, '--micro', 4)
    a, b = weights(plain, 20), weights(tmp_path / 'run', 20)
    assert all(largest_difference(a, b, f'{k}.safetensors') < 1e-4 for k in ('student', 'fake', 'heads'))


def test_resumed_is_uninterrupted_bit_for_bit(plain, tmp_path):
    """Stopped by SIGKILL somewhere after the save at 10, then the same command again."""
    command = [sys.executable, *map(str, TRAIN), '--out', str(tmp_path / 'run'), '--iters', '20', '--save_every', '10']
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 300
    while not (tmp_path / 'run/student/student.json').exists() and time.time() < until:
        time.sleep(.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / 'run/state-0000020').exists()
    (tmp_path / 'run/state-0000015.tmp').mkdir()                                      # a save that the kill cut short
    done = train(tmp_path / 'run', '--iters', 20, '--save_every', 10)
    assert 'from iteration 10' in done.stdout
    assert largest_difference(weights(plain, 20), weights(tmp_path / 'run', 20)) == 0
    lines = [json.loads(x)['iteration'] for x in (tmp_path / 'run/log.jsonl').read_text().splitlines()]
    assert lines == [5, 10, 15, 20]


def test_what_a_run_leaves_behind(plain):
    names = {f.name for f in plain.iterdir()}
    assert {'args.json', 'log.jsonl', 'curves.png', 'samples-0000000.png', 'samples-0000020.png', 'state-0000020', 'student'} <= names
    rows = [json.loads(x) for x in (plain / 'log.jsonl').read_text().splitlines()]
    for key in ('fake', 'gan/d', 'gan/g', 'gan/real', 'gan/made', 'grad/dm', 'grad/gan', 'norm/student', 'seconds', 'memory', 'dropped', 'skipped'):
        assert all(np.isfinite(row[key]) for row in rows), key
    assert {k for row in rows for k in row if k.startswith('dm/')} <= {'dm/999', 'dm/749', 'dm/499'}
    again = train(plain, '--iters', 20, '--save_every', 10)                           # a finished run: nothing to do, no error
    assert 'from iteration 20' in again.stdout


@pytest.mark.parametrize('flags', [
    ['--gan', 'latent', '--no-split', '--ttur', 2, '--couple', 1], ['--gan', 'none'], ['--gan', 'latent'], ['--no-split'],
    ['--checkpointing', '--gan_crop', 32, '--save_dtype', 'float32', '--workers', 0]])
def test_ablations_run(flags, tmp_path):
    train(tmp_path / 'run', '--iters', 4, '--log_every', 1, *flags)
    rows = [json.loads(x) for x in (tmp_path / 'run/log.jsonl').read_text().splitlines()]
    assert len(rows) == 4 and all(row['dropped'] == 0 for row in rows)
    assert ('gan/d' in rows[0]) == ('none' not in flags)
    if '--ttur' in flags:
        assert ['grad/dm' in row for row in rows] == [True, False, True, False]


def test_latent_gan_is_the_same_on_two_ranks(tmp_path):
    """Here the discriminator's gradient enters the fake score past its DDP wrapper: it must be averaged all the same."""
    flags = ['--gan', 'latent', '--no-split', '--ttur', 2, '--couple', 1, '--iters', 6, '--micro', 8]
    train(tmp_path / 'a', *flags)
    train(tmp_path / 'b', *flags, ranks=2)
    a, b = weights(tmp_path / 'a', 6), weights(tmp_path / 'b', 6)
    assert all(largest_difference(a, b, f'{k}.safetensors') < 1e-5 for k in ('student', 'fake', 'heads'))


# --------------------------------------------------------------------------------------------------- sample, evaluate

@pytest.mark.parametrize('steps, said', [(1, 'a subset of'), (2, 'a subset of'), (4, 'its own steps'), (8, 'a finer grid')])
def test_sample_any_number_of_steps(steps, said, tmp_path):
    done = start('sample.py', '--ckpt', 'assets/toy/student', '--steps', steps, '--n', 3, '--batch', 2, '--out', tmp_path / 's.png')
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout and 's per picture in the first call' in done.stdout
    assert Image.open(tmp_path / 's.png').size[0] > 300


def test_sample_teacher_prompt_and_prompts_file(tmp_path):
    (tmp_path / 'p.txt').write_text('a red circle on blue\n\na green ring on black\n')
    for flags in (['--teacher', '--steps', 3, '--cfg', 2], ['--prompts', tmp_path / 'p.txt'], ['--prompt', 'a red star on white']):
        done = start('sample.py', '--ckpt', 'assets/toy/student', *flags, '--n', 2, '--out', tmp_path / 's.png')
        assert done.returncode == 0, done.stderr[-2000:]


def test_a_huge_prompt_is_cut(tmp_path):
    (tmp_path / 'p.txt').write_text('a red circle on blue ' * 50_000)
    done = start('sample.py', '--ckpt', 'assets/toy/student', '--prompts', tmp_path / 'p.txt', '--n', 1, '--out', tmp_path / 's.png')
    assert done.returncode == 0 and Image.open(tmp_path / 's.png').size[0] < 400, done.stderr[-2000:]


def test_sample_finds_the_newest_run(plain, tmp_path):
    for name in ('model.py', 'sample.py', 'assets'):
        (tmp_path / name).symlink_to(ROOT / name)
    assert 'assets/toy/student' in start('sample.py', '--n', 1, cwd=tmp_path).stdout
    shutil.copytree(plain / 'student', tmp_path / 'out/stage1/student')
    assert 'out/stage1/student' in start('sample.py', '--n', 1, cwd=tmp_path).stdout
    assert (tmp_path / 'samples.png').exists()


def test_sample_is_plain_diffusers(plain, tmp_path):
    """sample.py's grid holds the pictures that diffusers alone makes from the saved folder with the same generators."""
    from diffusers import DiffusionPipeline
    import model as m
    done = start('sample.py', '--ckpt', plain, '--prompt', 'a red star on white', '--n', 2, '--out', tmp_path / 's.png')
    assert done.returncode == 0, done.stderr[-2000:]
    pipe = DiffusionPipeline.from_pretrained(plain / 'student', dtype=torch.float32)
    images = pipe(['a red star on white'] * 2, num_inference_steps=4, guidance_scale=0., output_type='pt',
                  generator=[m.generator(0, i) for i in range(2)]).images
    m.picture_grid([images * 2 - 1], ['a red star on white'] * 2, tmp_path / 'ours.png')
    a, b = (np.asarray(Image.open(tmp_path / f).convert('RGB')).astype(int) for f in ('s.png', 'ours.png'))
    assert np.abs(a - b).max() <= 1


def table(*flags, ranks=0, out=None):
    """What evaluate.py writes for the shipped student on 12 prompts, and what it prints."""
    done = start('evaluate.py', '--ckpt', 'assets/toy/student', '--n', 12, '--n_real', 64, '--out', out, *flags, ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '| R-precision |' in done.stdout
    return json.loads(out.read_text()), done.stdout


@pytest.fixture(scope='session')
def evaluated(tmp_path_factory):
    out = tmp_path_factory.mktemp('evaluated') / 'a.json'
    return out, *table('--teacher', '--teacher_steps', 3, '--batch', 5, '--sheet', 'pickscore', out=out)


def test_evaluate_does_not_depend_on_batch_or_ranks(evaluated, tmp_path):
    _, one, _ = evaluated
    two, _ = table('--teacher', '--teacher_steps', 3, '--batch', 16, ranks=2, out=tmp_path / 'b.json')
    assert len(one['rows']) == 2 and one['rows'].keys() == two['rows'].keys() and one['settings'] == two['settings']
    for label, row in one['rows'].items():
        other = two['rows'][label]
        assert row['rprecision'] == other['rprecision']
        for metric, close in (('clip', 1e-2), ('pickscore', 1e-4), ('cmmd', 1e-3)):
            assert abs(row[metric]['value'] - other[metric]['value']) < close
            assert np.allclose(row[metric]['interval'], other[metric]['interval'], atol=close)
        assert row['per_picture']['index'] == other['per_picture']['index'] == list(range(12))
        assert np.allclose(row['per_picture']['pickscore'], other['per_picture']['pickscore'], atol=1e-4)


def test_intervals_are_those_of_a_mean_and_of_paired_differences(evaluated):
    _, result, _ = evaluated
    one, two = (np.array(row['per_picture']['clip']) for row in result['rows'].values())
    for entry, x in ((list(result['rows'].values())[0]['clip'], one), (list(result['differences'].values())[0]['clip'], one - two)):
        low, high = entry['interval']
        width = 2 * 1.96 * x.std() / len(x) ** .5
        assert abs(entry['value'] - x.mean()) < 1e-4 and low < x.mean() < high
        assert .75 * width < high - low < 1.25 * width


def test_pictures_are_not_made_twice(evaluated):
    """A killed run: some pictures are there, one is gone. The rest are left alone and the table is the same."""
    out, result, said = evaluated
    pictures = sorted(out.parent.glob('pictures/*/*.png'))
    assert len(pictures) == 24 and f'{out.parent}/a-pickscore-0.png' in said
    gone, times = np.array(Image.open(pictures[3])).astype(int), {f: f.stat().st_mtime_ns for f in pictures}
    pictures[3].unlink()
    again, _ = table('--teacher', '--teacher_steps', 3, '--batch', 5, out=out)
    assert {f for f in pictures if f.stat().st_mtime_ns != times[f]} == {pictures[3]}
    assert abs(np.array(Image.open(pictures[3])).astype(int) - gone).max() <= 1              # alone in its batch: rounding
    for label, row in result['rows'].items():
        assert all(abs(again['rows'][label][k]['value'] - row[k]['value']) < 1e-3 for k in ('clip', 'pickscore', 'cmmd'))


def test_a_metric_without_weights_leaves_the_others(tmp_path):
    result, said = table('--metrics', 'rprecision', 'hpsv2.1', 'fid', 'pickscore', out=tmp_path / 'a.json')
    row, = result['rows'].values()
    assert row.keys() >= {'rprecision', 'pickscore'} and not row.keys() & {'hpsv2.1', 'fid', 'clip'}
    assert result['unavailable'].keys() == {'hpsv2.1', 'fid'}
    assert 'HPSv2.1: xswu/HPSv2 could not be' in said and 'FID: ' in said


def test_any_pipeline_is_scored(tmp_path):
    result, _ = table('--pipeline', 'assets/toy/sdxl', '--teacher_steps', 2, '--metrics', 'rprecision', out=tmp_path / 'a.json')
    assert list(result['rows']) == ['assets/toy/sdxl, 2 steps, CFG 3']


def test_the_papers_rows_stand_below_sdxls(evaluated, tmp_path):
    folder = next(evaluated[0].parent.glob('pictures/*/000000.png')).parent
    done = start('evaluate.py', '--images', folder, '--recipe', 'sdxl', '--prompts', 'assets/toy/data/prompts.txt', '--metrics',
                 'clip', 'mps', '--clip', 'assets/toy/clip', '--out', tmp_path / 'a.json')
    assert done.returncode == 0, done.stderr[-2000:]
    assert '| paper: Flash-DMD stage 1, 64 x 1000 | - | 12.67 | 10,000 of COCO |' in done.stdout
    assert 'paper' not in evaluated[2]


def test_real_pictures_score_as_real(tmp_path):
    """Held-out pictures beside their own captions: near-perfect R-precision, CMMD near nothing. Swapped captions: not.
    Names tie pictures to prompts by number or by metadata.jsonl; an unreadable one is named and left out."""
    import datasets
    rows = datasets.load_dataset('parquet', data_files=str(ROOT / 'assets/toy/data/test.parquet'), split='train')[:64]
    (tmp_path / 'pictures').mkdir()
    for i, image in enumerate(rows['image']):
        image.save(tmp_path / f'pictures/{i}.png')                      # 10.png before 2.png in name order
    results = {}

    def run(name):
        done = start('evaluate.py', '--images', tmp_path / 'pictures', '--recipe', 'toy', '--prompts', tmp_path / f'{name}.txt',
                     '--out', tmp_path / f'{name}.json')
        assert done.returncode == 0, done.stderr[-2000:]
        results[name], = json.loads((tmp_path / f'{name}.json').read_text())['rows'].values()
        return done.stdout

    (tmp_path / 'own.txt').write_text('\n'.join(rows['text']))
    (tmp_path / 'swapped.txt').write_text('\n'.join(rows['text'][1:] + [rows['text'][0] + ' and more words' * 20]))
    run('own')
    assert '1 prompts were longer than its text encoder and cut' in run('swapped')
    (tmp_path / 'pictures/5.png').write_bytes(b'not a picture')
    with (tmp_path / 'pictures/metadata.jsonl').open('w') as file:
        for i in reversed(range(64)):
            file.write(json.dumps(dict(file_name=f'{i}.png', text=rows['text'][i])) + '\n')
    (tmp_path / 'tied.txt').write_text('metadata.jsonl has the prompts\n')
    assert '5.png cannot be read: left out' in run('tied')
    assert results['own']['rprecision']['value'] > .95 and results['swapped']['rprecision']['value'] < .2
    assert results['own']['cmmd']['value'] < .5
    assert results['own']['clip']['value'] > results['swapped']['clip']['value'] + 10
    assert results['tied']['n'] == 63 and results['tied']['unreadable'] == 1 and results['tied']['rprecision']['value'] > .95


# ------------------------------------------------------------------------------------------------------------ stage 2

def second(out, *flags, ranks=0, init='assets/toy/student'):
    """A run of stage 2 on the toy; returns its log lines and what it printed."""
    done = start('train_stage2.py', '--recipe', 'toy', '--sample_every', 0, '--eval_every', 0, '--log_every', 1, '--init', init,
                 '--out', out, *flags, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(x) for x in (out / 'log.jsonl').read_text().splitlines()], done.stdout


def test_the_first_ratios_are_one(tmp_path):
    rows, said = second(tmp_path / 'run', '--no-joint', '--iters', 3, '--batch', 4, '--micro', 4, '--warmup', 0)
    assert rows[0]['rl/ratio'] == 1 and rows[0]['rl/loss'] == float(np.float32(np.log(2)))
    assert rows[1]['rl/ratio'] != 1 and all('fake' not in row for row in rows)
    assert all(row['rl/unsound'] == 0 and row['rl/gap'] > 0 for row in rows)


def test_candidates_are_the_samplers_next_states_scored_at_their_own_noise(tmp_path, monkeypatch):
    """The script itself, in this process, with an ear at the reward: K states per prompt, spread by sigma', labelled s'."""
    import runpy
    import model as m
    seen, forward = [], m.LatentReward.forward
    monkeypatch.setattr(m.LatentReward, 'forward', lambda self, z, t, y: seen.append((z, t)) or forward(self, z, t, y))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', ['train_stage2.py', *'--recipe toy --init assets/toy/student --no-joint --gan none --iters 6 '
                                      '--batch 2 --micro 2 --candidates 8 --eval_every 0 --sample_every 0 --out'.split(),
                                      str(tmp_path / 'run')])
    schedule = runpy.run_path('train_stage2.py', run_name='__main__')['base'].schedule
    assert {int(t) for _, ts in seen for t in ts} == {749, 499}
    for z, t in seen:
        assert z.shape == (16, 16, 8, 8) and len(t.unique()) == 1
        spread = z.view(2, 8, -1).var(1).mean().sqrt()
        assert abs(spread / schedule.sigma(t[:1]).item() - 1) < .05


JOINT = ['--iters', 6, '--critic_warmup', 1, '--rl_ratio', 2, '--save_every', 3]


@pytest.fixture(scope='session')
def joint(tmp_path_factory):
    out = tmp_path_factory.mktemp('stage2') / 'run'
    return out, *second(out, *JOINT)


def test_distillation_and_preference_updates_alternate(joint):
    _, rows, said = joint
    assert ['fake' in row for row in rows] == [True, True, False, False, True, False]
    assert ['grad/dm' in row for row in rows] == [False, True, False, False, True, False]       # first the critics alone
    assert {k for row in rows for k in row if k.startswith('reward/')} <= {'reward/999', 'reward/749'}
    assert 'student: weights\n' in said and 'fake: not there: new, the teacher' in said and 'heads: not there: new, random' in said


def test_stage_2_on_two_ranks_is_one(joint, tmp_path):
    second(tmp_path / 'run', *JOINT, '--micro', 8, ranks=2)
    assert largest_difference(weights(joint[0], 6), weights(tmp_path / 'run', 6), '.safetensors') < 1e-4


def test_stage_2_resumes_bit_for_bit(joint, tmp_path):
    shutil.copytree(joint[0], tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run/state-0000006')
    _, said = second(tmp_path / 'run', *JOINT)
    assert 'from iteration 3' in said
    assert largest_difference(weights(joint[0], 6), weights(tmp_path / 'run', 6)) == 0


def test_stage_2_goes_on_from_a_run(plain, tmp_path):
    rows, said = second(tmp_path / 'run', '--iters', 2, '--batch', 8, '--micro', 8, '--rl_steps', 'all', '--clamp', .1, init=plain)
    for name in ('student', 'fake', 'heads'):
        assert f'{name}: weights and optimiser' in said
    assert 'fake' in rows[0] and 'rl/loss' in rows[1]
    done = start('sample.py', '--ckpt', tmp_path / 'run', '--n', 1, '--out', tmp_path / 'x.png')
    assert done.returncode == 0 and Image.open(tmp_path / 'x.png').size[0] > 60


def test_preference_updates_raise_the_reward(tmp_path):
    """And evaluations say so, beside what the reward does not see."""
    second(tmp_path / 'run', '--no-joint', '--gan', 'none', '--iters', 24, '--warmup', 4, '--rl_lr', 1e-4, '--eval_every', 24,
           '--eval_n', 32)
    before, after = [json.loads(x) for x in (tmp_path / 'run/eval.jsonl').read_text().splitlines()]
    assert after['reward'] > before['reward'] + .1
    assert {'rprecision', 'cmmd', 'pickscore', 'saturation', 'brightness'} <= before.keys()


# ---------------------------------------------------------------------------------------------------------- bad input

class Payload:
    def __reduce__(self):
        return print, ('unpickled',)


def prepare(folder):
    """Broken things to point flags at."""
    (folder / 'empty.txt').write_text('\n \n')
    (folder / 'binary.txt').write_bytes(b'\xff\xfe\x00\x80' * 10)
    (folder / 'notes').mkdir()
    (folder / 'notes/readme.md').write_text('x')
    torch.save({'image_encoder.pos_embed': torch.zeros(1, 4, 4, 8)}, folder / 'wrong.pth')
    torch.save({'image_encoder.pos_embed': Payload()}, folder / 'pickled.pth')
    whole = (ROOT / 'assets/toy/sam.pth').read_bytes()
    (folder / 'short.pth').write_bytes(whole[:len(whole) // 2])
    shutil.copytree(ROOT / 'assets/toy/sdxl', folder / 'damaged')
    file = folder / 'damaged/unet/diffusion_pytorch_model.safetensors'
    file.write_bytes(file.read_bytes()[:1000])
    shutil.copytree(ROOT / 'assets/toy/student', folder / 'student')
    (folder / 'student/student.json').write_text('{')
    (folder / 'a_file').write_text('keep me')
    for name in ('short', 'lacking', 'other', 'pickled'):
        shutil.copytree(ROOT / 'assets/toy/lrm', folder / f'lrm_{name}')
    file = folder / 'lrm_short/unet/diffusion_pytorch_model.safetensors'
    file.write_bytes(file.read_bytes()[:1000])
    file = folder / 'lrm_lacking/unet/diffusion_pytorch_model.safetensors'
    save_file({k: v for k, v in load_file(file).items() if not k.startswith('mid_block.resnets.0')}, file)
    config = json.loads((folder / 'lrm_other/unet/config.json').read_text())
    file = folder / 'lrm_other/unet/diffusion_pytorch_model.safetensors'
    save_file(load_file(file) | {'conv_in.weight': torch.zeros(64, 4, 3, 3)}, file)
    (folder / 'lrm_other/unet/config.json').write_text(json.dumps(config | dict(in_channels=4)))
    torch.save({'logit_scale': Payload()}, folder / 'lrm_pickled/state_dict.pt')
    for name in ('twice/1.png', 'twice/01.jpg', 'unreadable/0.png', 'unreadable/1.png', 'untied/metadata.jsonl'):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{}')
    (folder / 'other.json').write_text('{"settings": {}}')
    facts = json.loads((ROOT / 'assets/toy/student/student.json').read_text())
    for name, content in dict(
            list=[facts], lacking={k: v for k, v in facts.items() if k != 'prompts'}, types=facts | dict(iteration='300'),
            steps=facts | dict(steps=['999', '749']), no_steps=facts | dict(steps=[]), prompts=facts | dict(prompts=[1]),
            null=None, lost=facts | dict(base_model='no/where/at/all'), recipe=facts | dict(recipe='cake')).items():
        (folder / f'student_{name}').mkdir()
        (folder / f'student_{name}/student.json').write_text(json.dumps(content))
    (folder / 'student_deep').mkdir()
    (folder / 'student_deep/student.json').write_text('[' * 100000)
    (folder / 'student_folder/student.json').mkdir(parents=True)
    for name, content in dict(damaged='{', list='[1]', types='{"batch": [4]}', choice='{"gan": "dino"}').items():
        (folder / f'init_{name}/student').mkdir(parents=True)
        (folder / f'init_{name}/student/student.json').write_text(json.dumps(facts))
        (folder / f'init_{name}/args.json').write_text(content)
    for name, flags in dict(one={'model': 'assets/toy/sdxl'}, two={'model': 'assets/toy/sdxl', 'rl_ratio': 5}).items():
        (folder / f'stage_{name}/state-0000005').mkdir(parents=True)
        (folder / f'stage_{name}/state-0000005/state.json').write_text(json.dumps(dict(iteration=5, args=flags)))


TORCHRUN = ['MASTER_ADDR=127.0.0.1', 'MASTER_PORT=29571', 'LOCAL_RANK=0']
BAD = [                          # script, flags and before them what is set in the environment, what the sentence names
    ('train_stage1.py', ['--iterz', 3], 'unrecognized'),
    ('train_stage1.py', ['--iter', 3], 'unrecognized'),
    ('train_stage1.py', ['--gan', 'dino'], 'invalid choice'),
    ('train_stage1.py', ['--batch', 10, '--micro', 4], '--batch 10'),
    ('train_stage1.py', ['--batch', 0], '--batch 0'),
    ('train_stage1.py', ['--steps', 0], '--steps 0'),
    ('train_stage1.py', ['--steps', 1], '--steps 1'),
    ('train_stage1.py', ['--gan_crop', 30], '--gan_crop 30'),
    ('train_stage1.py', ['--couple', 2], '--couple'),
    ('train_stage1.py', ['--model', 'TMP/nowhere'], '--model'),
    ('train_stage1.py', ['--model', 'TMP/notes'], '--model'),
    ('train_stage1.py', ['--model', 'TMP/damaged'], '--model'),
    ('train_stage1.py', ['--model', 'some-body/no-such-model'], '--model assets/toy/sdxl'),
    ('train_stage1.py', ['--sam', 'TMP/nowhere.pth'], '--sam'),
    ('train_stage1.py', ['--sam', 'TMP/wrong.pth'], '--sam'),
    ('train_stage1.py', ['--sam', 'TMP/short.pth'], '--sam'),
    ('train_stage1.py', ['--sam', 'TMP/pickled.pth'], 'pickled'),
    ('train_stage1.py', ['--sam', 'vit_b'], '--sam assets/toy/sam.pth'),
    ('train_stage1.py', ['--data', 'TMP/nowhere'], '--data'),
    ('train_stage1.py', ['--data', 'TMP/notes', '--data_files', ''], '--data'),
    ('train_stage1.py', ['--data', 'TMP/a_file'], '--data'),
    ('train_stage1.py', ['--data', 'some-body/no-such-data'], '--data assets/toy/data'),
    ('train_stage1.py', ['--text_column', 'caption'], '--text_column caption'),
    ('train_stage1.py', ['--image_column', 'text'], '--image_column text'),
    ('train_stage1.py', ['--prompts', 'TMP/empty.txt'], '--prompts'),
    ('train_stage1.py', ['--out', 'TMP/a_file'], '--out'),
    ('train_stage1.py', ['--out', 'TMP/a_file/run'], '--out'),
    ('train_stage1.py', ['--out', '/proc/run'], '--out'),
    ('train_stage1.py', ['--out', 'TMP/stage_two'], 'the other stage'),
    ('train_stage1.py', ['--iters', 'many'], '--iters'),
    ('train_stage1.py', ['--steps', 1001], '--steps 1001'),
    ('train_stage1.py', ['--warmup', -1], '--warmup -1'),
    ('train_stage1.py', ['--seed', -1], '--seed -1'),
    ('train_stage1.py', ['--seed', 2 ** 70], '--seed'),
    ('train_stage1.py', ['--student_lr', 'nan'], '--student_lr nan'),
    ('train_stage1.py', ['--fake_lr=-1e-4'], '--fake_lr -0.0001'),
    ('train_stage1.py', ['--heads_lr', 'inf'], '--heads_lr inf'),
    ('train_stage1.py', ['--gan_weight', 'nan'], '--gan_weight nan'),
    ('train_stage1.py', ['--cfg', 'nan'], '--cfg nan'),
    ('train_stage1.py', ['--couple', 'nan'], '--couple nan'),
    ('train_stage1.py', ['--model', ''], '--model'),
    ('train_stage1.py', ['--sam', 'TMP/notes'], '--sam'),
    ('train_stage1.py', ['--prompts', 'TMP/notes'], '--prompts'),
    ('train_stage1.py', ['RANK=0'], 'RANK=0'),
    ('train_stage1.py', ['WORLD_SIZE=2'], 'WORLD_SIZE=2'),
    ('train_stage1.py', [*TORCHRUN, 'WORLD_SIZE=2'], 'WORLD_SIZE=2'),
    ('train_stage1.py', [*TORCHRUN, 'RANK=one', 'WORLD_SIZE=2'], 'RANK=one'),
    ('train_stage1.py', [*TORCHRUN, 'RANK=2', 'WORLD_SIZE=2'], 'RANK=2'),
    ('train_stage1.py', [*TORCHRUN, 'RANK=1', 'WORLD_SIZE=2', 'LOCAL_RANK=-1'], 'LOCAL_RANK=-1'),
    ('train_stage1.py', ['RANK=0', 'LOCAL_RANK=0', 'WORLD_SIZE=2'], 'torchrun'),
    ('train_stage1.py', [*TORCHRUN, 'RANK=0', 'WORLD_SIZE=3'], '--batch 16'),
    ('train_stage2.py', ['--init', 'TMP/nowhere'], '--init'),
    ('train_stage2.py', ['--init', 'TMP/notes'], '--init'),
    ('train_stage2.py', ['--candidates', 1], '--candidates 1'),
    ('train_stage2.py', ['--clamp', 1], '--clamp 1'),
    ('train_stage2.py', ['--rl_ratio', 0], '--rl_ratio 0'),
    ('train_stage2.py', ['--rl_steps', 249], 'invalid choice'),
    ('train_stage2.py', ['--steps', 1, '--no-split'], '--rl_steps high'),
    ('train_stage2.py', ['--recipe', 'toy-sd3'], '--recipe toy-sd3'), ('train_stage2.py', ['--lrm', 'TMP/nowhere'], '--lrm'),
    ('train_stage2.py', ['--lrm', 'some-body/no-such-lrm'], '--lrm'),
    ('train_stage2.py', ['--lrm', 'TMP/lrm_short'], '--lrm'),
    ('train_stage2.py', ['--lrm', 'TMP/lrm_lacking'], 'lacks mid_block'),
    ('train_stage2.py', ['--lrm', 'TMP/lrm_other'], 'latent channels'),
    ('train_stage2.py', ['--lrm', 'TMP/lrm_pickled'], '--lrm'),
    ('train_stage2.py', ['--rl_prompts', 'TMP/empty.txt'], '--rl_prompts'),
    ('train_stage2.py', ['--rl_prompts', 'TMP/notes'], '--rl_prompts'),
    ('train_stage2.py', ['--rl_lr', 'nan'], '--rl_lr nan'),
    ('train_stage2.py', ['--student_lr', 'nan'], '--student_lr nan'),
    ('train_stage2.py', ['--beta', 'nan'], '--beta nan'),
    ('train_stage2.py', ['--clamp', 'nan'], '--clamp nan'),
    ('train_stage2.py', ['--out', 'TMP/stage_one'], 'the other stage'),
    ('train_stage2.py', ['--init', 'TMP/student_steps'], '--init'),
    ('train_stage2.py', ['--init', 'TMP/student_recipe', '--recipe', ''], 'cake'),
    ('train_stage2.py', ['--init', 'TMP/init_damaged'], 'args.json is damaged'),
    ('train_stage2.py', ['--init', 'TMP/init_list'], 'args.json is damaged'),
    ('train_stage2.py', ['--init', 'TMP/init_types'], '--batch'),
    ('train_stage2.py', ['--init', 'TMP/init_choice'], '--gan'),
    ('train_stage2.py', ['RANK=0', 'WORLD_SIZE=1'], 'RANK=0'),
    ('sample.py', ['--steps', 0], '--steps 0'),
    ('sample.py', ['--steps', 1001], '--steps 1001'),
    ('sample.py', ['--cfg', 'nan'], '--cfg nan'),
    ('sample.py', ['--seed', -1], '--seed -1'),
    ('sample.py', ['--out', 'TMP/notes'], 'is a folder'),
    ('sample.py', ['--out', '/proc/x.png'], '--out'),
    ('sample.py', ['--prompts', 'TMP/notes'], '--prompts'),
    ('sample.py', ['--teacher', '--ckpt', 'TMP/student_lost'], '--teacher'),
    *(('sample.py', ['--ckpt', f'TMP/student_{name}'], '--ckpt')
      for name in ('list', 'lacking', 'types', 'steps', 'no_steps', 'prompts', 'null', 'deep', 'folder')),
    ('sample.py', ['--step', 4], 'unrecognized'),
    ('sample.py', ['--ckpt', 'TMP/nowhere'], '--ckpt'),
    ('sample.py', ['--ckpt', 'TMP/notes'], '--ckpt'),
    ('sample.py', ['--ckpt', 'TMP/student'], '--ckpt'),
    ('sample.py', ['--prompts', 'TMP/empty.txt'], '--prompts'),
    ('sample.py', ['--prompts', 'TMP/binary.txt'], '--prompts'),
    ('sample.py', ['--prompts', 'TMP/nowhere.txt'], '--prompts'),
    ('sample.py', ['--out', 'TMP/a_file/x.png'], '--out'),
    ('sample.py', ['--n', 0], '--n 0'),
    ('evaluate.py', ['--n', 100000], '--n 100000'),
    ('evaluate.py', ['--clip', 'TMP/notes', '--metrics', 'clip'], 'TMP/notes'),
    ('evaluate.py', ['--metrics', 'beauty'], 'invalid choice'),
    ('evaluate.py', ['--sheet', 'mps'], '--sheet mps'),
    ('evaluate.py', ['--images', 'TMP/notes'], '--images'),
    ('evaluate.py', ['--images', 'TMP/nowhere'], '--images'),
    ('evaluate.py', ['--images', 'TMP/twice'], 'the same number'),
    ('evaluate.py', ['--images', 'TMP/untied'], 'metadata.jsonl'),
    ('evaluate.py', ['--pipeline', 'TMP/notes'], '--pipeline'),
    ('evaluate.py', ['--out', 'TMP/other.json'], '--out'),
    ('evaluate.py', ['--real', 'TMP/nowhere'], '--real'),
    ('evaluate.py', ['--ckpt', 'TMP/student_lacking'], '--ckpt'),
    ('evaluate.py', ['--ckpt', 'TMP/student_recipe'], 'cake'),
    ('evaluate.py', ['--out', 'TMP/notes'], '--out'),
    ('evaluate.py', ['--prompts', 'TMP/notes'], '--prompts'),
    ('evaluate.py', ['--cfg', 'nan'], '--cfg nan'),
    ('evaluate.py', ['--n', -1], '--n -1'),
    ('evaluate.py', ['RANK=0'], 'RANK=0'),
    ('evaluate.py', [*TORCHRUN, 'RANK=0', 'WORLD_SIZE=two'], 'WORLD_SIZE=two'),
    ('tests/make_toy.py', ['--only', 'everything'], 'invalid choice'),
    ('tests/make_toy.py', ['--iter', 3], 'unrecognized'),
    ('tests/make_toy.py', ['--iters', -1], '--iters -1'),
    ('tests/make_toy.py', ['--pictures', 0], '--pictures 0'),
    ('tests/make_toy.py', ['--seed', -1], '--seed -1'),
    ('tests/make_toy.py', ['--device', 'abacus'], '--device abacus'),
    ('tests/make_toy.py', ['--device', 'cuda'], '--device cuda'),
    ('tests/make_toy.py', ['--out', 'TMP/a_file'], '--out'),
    ('tests/make_toy.py', ['--work', '/proc/work'], '--work'),
]


def test_pictures_that_cannot_be_read_at_all(tmp_path):
    prepare(tmp_path)
    done = start('evaluate.py', '--recipe', 'toy', '--images', tmp_path / 'unreadable', '--out', tmp_path / 'a.json')
    assert done.returncode == 2 and 'none of its 2 pictures can be read' in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path / 'a.json').exists()


def listing(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file()}


@pytest.fixture(scope='session')
def outcomes(request, tmp_path_factory):
    """Every selected bad input's finished process, its broken things (their bytes before and after) and its output folder.
    Two processes at a time: starting Python takes most of their time, and one core."""
    broken = tmp_path_factory.mktemp('broken')
    prepare(broken)
    before = listing(broken), listing(ROOT / 'assets')

    def run(bad):
        script, flags, _ = bad
        out = tmp_path_factory.mktemp('out')
        env = dict(f.split('=') for f in flags if '=' in str(f) and f[0] != '-')
        flags = [str(f).replace('TMP', str(broken)) for f in flags if str(f).split('=')[0] not in env]
        extra = [] if '--out' in flags else ['--out', out / ('run' if script.startswith('train') else 'x.png')]
        if script.startswith('train'):
            extra += [x for k, v in [('--recipe', 'toy'), ('--iters', 1)] if k not in flags for x in (k, v)]
        if script == 'tests/make_toy.py':
            extra += [x for k, v in [('--only', 'data'), ('--work', out / 'work')] if k not in flags for x in (k, v)]
        extra += ['--ckpt', 'assets/toy/student'] if script in ('sample.py', 'evaluate.py') and '--ckpt' not in flags else []
        try:
            return start(script, *flags, *extra, timeout=120, env=env), out
        except subprocess.TimeoutExpired:                                      # it took the bad input, and others still count
            return subprocess.CompletedProcess(script, -9, '', 'still running after 120 s'), out

    chosen = [BAD.index(tuple(item.callspec.params[k] for k in ('script', 'flags', 'names'))) for item in request.session.items
              if item.name.startswith('test_bad_input')]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(chosen, pool.map(run, [BAD[k] for k in chosen])))
    return found, broken, before, (listing(broken), listing(ROOT / 'assets'))


@pytest.mark.parametrize('script, flags, names', BAD, ids=[f'{s[:-3]} {" ".join(map(str, f))}' for s, f, _ in BAD])
def test_bad_input_is_one_sentence(script, flags, names, outcomes):
    found, folder, before, after = outcomes
    done, out = found[BAD.index((script, flags, names))]
    lines = [x for x in done.stderr.splitlines() if x and not x.startswith('usage:')]
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(lines) == 1 and 'error: ' in lines[0] and names.replace('TMP', str(folder)) in lines[0], done.stderr[-2000:]
    assert 'Traceback' not in done.stderr and 'unpickled' not in done.stdout
    assert after[0] == before[0] and after[1] == before[1] and not listing(out)


def test_a_run_of_another_model_is_not_overwritten(plain, tmp_path):
    shutil.copytree(plain, tmp_path / 'run')
    shutil.copytree(ROOT / 'assets/toy/sdxl', tmp_path / 'other')
    before = listing(tmp_path / 'run')
    done = start(*TRAIN, '--out', tmp_path / 'run', '--model', tmp_path / 'other', '--iters', 20)
    assert done.returncode == 2 and 'choose another --out' in done.stderr and listing(tmp_path / 'run') == before


@pytest.mark.parametrize('script', [
    'train_stage1.py', 'train_stage2.py', 'sample.py', 'evaluate.py', 'tests/make_toy.py', 'tests/bench.py'])
def test_help(script):
    done = start(script, '--help')
    assert done.returncode == 0 and '--' in done.stdout


def test_the_default_recipe_is_the_toy_without_a_gpu(tmp_path):
    done = start('train_stage1.py', '--iters', 1, '--gan', 'none', '--sample_every', 0, '--out', tmp_path / 'run')
    assert done.returncode == 0 and 'recipe toy: assets/toy/sdxl' in done.stdout
