"""
Data, checkpoints, the exported student and the toy world's files.    pytest tests/test_files.py
"""

import io
import json
import os
import pickle
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import make_toy
import model as m
from conftest import ROOT, start


# --------------------------------------------------------------------------------------------------------------- data

def png(size=(80, 64), colour='red'):
    buffer = io.BytesIO()
    Image.new('RGB', size, colour).save(buffer, 'PNG')
    return buffer.getvalue()


def folder_of_pictures(folder, n=6):
    folder.mkdir()
    lines = []
    for i in range(n):
        (folder / f'{i}.png').write_bytes(png(colour=(40 * i, 0, 0)))
        lines.append(json.dumps({'file_name': f'{i}.png', 'text': f'picture {i}'}))
    (folder / 'metadata.jsonl').write_text('\n'.join(lines))
    return folder


def test_every_kind_of_source(tmp_path):
    """imagefolder, parquet, webdataset tar with a nested caption column: same interface."""
    sample = m.Pictures(str(folder_of_pictures(tmp_path / 'a')), '', 'image', 'text', 64, 0)[0]
    assert sample['pixels'].shape == (3, 64, 64) and sample['text'].startswith('picture') and sample['skipped'] == 0
    assert -1 <= sample['pixels'].min() and sample['pixels'].max() <= 1
    sample = m.Pictures(str(ROOT / 'assets/toy/data/train.parquet'), '', 'image', 'text', 64, 0)[0]
    assert sample['text'].startswith('a ')
    with tarfile.open(tmp_path / 'shard.tar', 'w') as tar:
        for i in range(3):
            for suffix, data in [('jpg', png()), ('json', json.dumps({'prompt': f'tar {i}'}).encode())]:
                info = tarfile.TarInfo(f'{i}.{suffix}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    sample = m.Pictures(str(tmp_path / 'shard.tar'), '', 'jpg', 'json.prompt', 64, 0)[0]
    assert sample['text'].startswith('tar')


def test_an_archive_writes_nothing_outside(tmp_path):
    """Names with ../ and absolute ones in a webdataset tar: its pictures are rows like others, no file of it is unpacked."""
    (tmp_path / 'a/b').mkdir(parents=True)
    with tarfile.open(tmp_path / 'a/b/shard.tar', 'w') as tar:
        for i, name in enumerate(['../up', '../../up', f'{tmp_path}/absolute', 'x/../../up']):
            for suffix, data in [('jpg', png()), ('json', json.dumps({'prompt': f'tar {i}'}).encode())]:
                info = tarfile.TarInfo(f'{name}{i}.{suffix}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    pictures = m.Pictures(str(tmp_path / 'a/b/shard.tar'), '', 'jpg', 'json.prompt', 64, 0)
    assert {pictures[i]['text'] for i in range(4)} == {f'tar {i}' for i in range(4)}
    assert [f.name for f in tmp_path.rglob('*') if f.is_file()] == ['shard.tar']
    assert not [*ROOT.glob('up*'), *ROOT.parent.glob('up*'), *tmp_path.parent.glob('up*')]


def test_broken_and_tiny_pictures_are_skipped_and_counted(tmp_path):
    folder = folder_of_pictures(tmp_path / 'a')
    (folder / '1.png').write_bytes(png()[:60])
    (folder / '2.png').write_bytes(png((20, 20)))
    (folder / '3.png').write_bytes(b'not a picture')
    pictures = m.Pictures(str(folder), '', 'image', 'text', 64, 0)
    samples = [pictures[i] for i in range(6)]
    assert {s['text'] for s in samples} == {f'picture {i}' for i in (0, 4, 5)}
    assert sum(s['skipped'] for s in samples) >= 3


def test_centre_crop(tmp_path):
    wide = Image.new('RGB', (192, 64), 'red')
    wide.paste('blue', (64, 0, 128, 64))
    (tmp_path / 'a').mkdir()
    wide.save(tmp_path / 'a/0.png')
    (tmp_path / 'a/metadata.jsonl').write_text(json.dumps({'file_name': '0.png', 'text': 'x'}))
    pixels = m.Pictures(str(tmp_path / 'a'), '', 'image', 'text', 64, 0)[0]['pixels']
    assert torch.allclose(pixels[:, 4:-4, 4:-4], torch.tensor([-1., -1, 1]).view(3, 1, 1), atol=.02)


def test_batches_do_not_depend_on_ranks_or_workers():
    pictures = m.Pictures(str(ROOT / 'assets/toy/data'), 'test.parquet', 'image', 'text', 64, 3)
    one = [b['text'] for b in pictures.batches(8, 0, 1, range(62, 68), 2)]                  # 512 pictures: crosses an epoch
    two = [[b['text'] for b in pictures.batches(8, r, 2, range(62, 68), 0)] for r in range(2)]
    assert one == [a + b for a, b in zip(*two)] and len(one) == 6
    seen = [t for b in pictures.batches(8, 0, 1, range(64), 0) for t in b['text']]
    assert sorted(seen) == sorted(pictures.rows['text'])                                    # an epoch is every row once
    assert seen[:64] != pictures.rows['text'][:64]


# -------------------------------------------------------------------------------------------------------- checkpoints

def pieces(seed=0, width=3):
    torch.manual_seed(seed)
    net = torch.nn.Linear(width, 2)
    opt = torch.optim.AdamW(net.parameters(), lr=.1)
    for _ in range(3):
        net(torch.randn(4, width)).square().mean().backward()
        m.update(opt, net)
    return {'student': net}, {'student': opt}


ARGS = dict(model='a', batch=4)


def save(folder, it, nets, opts):
    m.save_state(folder, it, nets, {f'{k}.opt': m.whole_moments(opt) for k, opt in opts.items()}, ARGS)


def test_state_comes_back_whole_and_the_last_two_stay(tmp_path):
    nets, opts = pieces()
    for it in (10, 20, 30):
        save(tmp_path, it, nets, opts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['state-0000020', 'state-0000030']
    (tmp_path / 'state-0000040.tmp').mkdir()                                                # what a kill leaves behind
    others, states = pieces(1)
    assert m.load_state(tmp_path, others, states, ARGS) == 30
    assert torch.equal(others['student'].weight, nets['student'].weight)
    x = torch.randn(4, 3)
    for n, o in ((nets, opts), (others, states)):                        # equal moments: the next step is the same
        n['student'](x).square().mean().backward()
        m.update(o['student'], n['student'])
    assert torch.equal(others['student'].weight, nets['student'].weight)
    assert m.load_state(tmp_path / 'empty', others, states, ARGS) == 0


def damage_truncate(state):
    file = state / 'student.safetensors'
    file.write_bytes(file.read_bytes()[:-20])


def damage_pickle(state):
    (state / 'student.safetensors').write_bytes(pickle.dumps({'weight': [1]}))


def damage_json(state):
    (state / 'state.json').write_text('{')


def damage_shape(state):
    nets, opts = pieces(width=5)
    save(state.parent, 30, nets, opts)


@pytest.mark.parametrize('damage', [damage_truncate, damage_pickle, damage_json, damage_shape])
def test_a_damaged_state_ends_with_a_sentence(tmp_path, damage, capsys):
    nets, opts = pieces()
    save(tmp_path, 30, nets, opts)
    damage(tmp_path / 'state-0000030')
    with pytest.raises(SystemExit) as stop:
        m.load_state(tmp_path, *pieces(), ARGS)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and 'state-0000030' in error


def test_a_state_of_another_model_is_refused(tmp_path, capsys):
    save(tmp_path, 30, *pieces())
    with pytest.raises(SystemExit):
        m.load_state(tmp_path, *pieces(), dict(ARGS, model='b'))
    assert 'holds a run of --model a' in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / 'x.json').write_text('old')
    with pytest.raises(KeyError):
        with m.replacing(tmp_path / 'x.json') as tmp:
            tmp.write_text('half')
            raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ['x.json'] and (tmp_path / 'x.json').read_text() == 'old'


def test_more_ranks_than_gpus(monkeypatch, capsys):
    """Two ranks on a machine with one GPU: both stop, and the first says so."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    env = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', LOCAL_WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')
    for k, v in env.items():
        monkeypatch.setenv(k, v)
    assert m.ranks() == (0, 0, 1)
    monkeypatch.setenv('WORLD_SIZE', '2'), monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    for rank in ('0', '1'):
        monkeypatch.setenv('RANK', rank), monkeypatch.setenv('LOCAL_RANK', rank)
        with pytest.raises(SystemExit) as stop:
            m.ranks()
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count('\n') == (rank == '0') and ('2 ranks' in said) == (rank == '0')


@pytest.mark.skipif(os.geteuid() == 0, reason='permissions do not bind root')
def test_a_folder_without_write_permission(tmp_path, capsys):
    tmp_path.chmod(0o500)
    for path in (tmp_path, tmp_path / 'new'):
        with pytest.raises(SystemExit) as stop:
            m.writable_folder(path, '--out')
        assert stop.value.code == 2 and f'--out {path} cannot be written' in capsys.readouterr().err


def test_no_code_that_runs_what_it_reads():
    """No pickles, no code from the hub, no shell, in the scripts and in what the tests run as scripts."""
    files = [*ROOT.glob('*.py'), ROOT / 'tests/make_toy.py', ROOT / 'tests/bench.py']
    assert len(files) >= 8
    for file in files:
        code = file.read_text()
        for word in ('pickle.load', 'Unpickler(', 'trust_remote_code', 'shell=', 'os.system', 'os.popen', 'weights_only=False',
                     'allow_pickle=True', 'yaml.load'):
            assert word not in code, (file.name, word)
        assert not re.search(r'(?<![\w.])(?:eval|exec)\(', code), file.name
        for call in re.findall(r'(?:torch\.load|load_state_dict_from_url)\(.*', code):
            assert 'weights_only=True' in call, (file.name, call)


# ------------------------------------------------------------------------------------------------ the exported student

def test_exported_student_is_the_same_sampler_in_plain_diffusers(toy, tmp_path):
    """DiffusionPipeline.from_pretrained on the saved folder, its own four steps, the same noise: our sampler's picture."""
    from diffusers import DiffusionPipeline
    import diffusers.schedulers.scheduling_lcm as lcm
    steps = toy.schedule.steps(4)
    m.save_student(tmp_path / 'student', toy, toy.teacher, steps, torch.float32, dict(base_model='x'))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / 'student')
    noise = torch.randn(2, 4, *toy.latent_shape, generator=torch.Generator().manual_seed(0))
    prompts = ['a red circle on blue', 'a striped white star above a green ring on black']
    with torch.no_grad():
        ours = toy.decode(m.backward_simulation(toy, toy.teacher, steps, noise, toy.encode(prompts)))
    fresh, old = iter(noise[:, 1:].unbind(1)), lcm.randn_tensor
    lcm.randn_tensor = lambda *a, **k: next(fresh)
    try:
        theirs = pipe(prompts, latents=noise[:, 0], num_inference_steps=4, guidance_scale=0., output_type='pt').images
    finally:
        lcm.randn_tensor = old
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert torch.allclose(theirs, (ours / 2 + .5).clamp(0, 1), atol=2e-3)
    saved = json.loads((tmp_path / 'student/student.json').read_text())
    assert saved == dict(base_model='x', steps=[999, 749, 499, 249])


def test_sdxl_conditioning_is_diffusers(toy):
    """Unconditional embeddings are zeros, and base.predict is the pipeline's own UNet call."""
    assert all((u == 0).all() for u in toy.uncond)
    prompts, z = ['a red circle on blue'] * 2, torch.randn(2, *toy.latent_shape, generator=torch.Generator().manual_seed(0))
    caught = {}

    def catch(net, args, kwargs, output):
        caught.setdefault('call', (args, kwargs, output[0]))

    hook = toy.teacher.register_forward_hook(catch, with_kwargs=True)
    toy.pipe(prompts, latents=z, num_inference_steps=2, guidance_scale=0., output_type='latent')
    hook.remove()
    (x, t), kwargs, out = caught['call']
    y = toy.encode(prompts)
    assert torch.equal(kwargs['encoder_hidden_states'], y[0]) and torch.equal(kwargs['added_cond_kwargs']['text_embeds'], y[1])
    with torch.no_grad():
        assert torch.allclose(toy.predict(toy.teacher, x, t.expand(2), y), out, atol=1e-5)


def test_the_up_path_is_not_computed_for_the_bottleneck(toy):
    calls = []
    hook = toy.teacher.up_blocks[0].register_forward_hook(lambda *a: calls.append(1))
    x, t = torch.randn(2, *toy.latent_shape), torch.tensor([999, 249])
    with torch.no_grad():
        h = m.bottleneck(toy, toy.teacher, x, t, toy.encode(['a', 'b']))
    hook.remove()
    assert h.shape == (2, 128, 4, 4) and not calls


# ------------------------------------------------------------------------------------------------------- the toy world

def test_captions_follow_the_grammar_and_neighbours_differ_in_one_word_group():
    import re
    thing = rf'a (?:(?:{"|".join(make_toy.TEXTURES[1:])}) )?(?:{"|".join(make_toy.COLOURS)}) (?:{"|".join(make_toy.SHAPES)})'
    grammar = re.compile(rf'{thing}(?: (?:left of|above) {thing})? on (?:{"|".join(make_toy.COLOURS)})')
    for i in range(300):
        scene = make_toy.draw_scene(np.random.default_rng([9, i]))
        assert grammar.fullmatch(make_toy.caption(scene))
        assert all(o[1] != scene['background'] and tuple(o) not in make_toy.UNSEEN for o in scene['objects'])
        near = make_toy.neighbours(scene)
        assert len(set(near)) >= 16 and make_toy.caption(scene) not in near and all(map(grammar.fullmatch, near))
    assert len(make_toy.UNSEEN) == 19


def test_masks_cover_the_objects():
    rng = np.random.default_rng(0)
    scene = dict(objects=[('plain', 'red', 'circle'), ('plain', 'blue', 'square')], relation='left of', background='black')
    image, masks = make_toy.render(scene, rng)
    for mask, channel in zip(masks, (0, 2)):
        assert mask.any() and image[mask][:, channel].mean() > .5 and image[mask][:, 1].mean() < .5
    assert np.argwhere(masks[0])[:, 1].mean() < np.argwhere(masks[1])[:, 1].mean()


def test_held_out_triples_never_occur_in_training():
    import datasets
    words = lambda t: (t[0] if t[0] != 'plain' else '', *t[1:])
    unseen = {'a ' + ' '.join(w for w in words(t) if w) for t in make_toy.UNSEEN}
    train = datasets.load_dataset('parquet', data_files=str(ROOT / 'assets/toy/data/train.parquet'), split='train')['text']
    import re
    things = {x for text in train for x in re.split(r' (?:left of|above) ', text.rsplit(' on ', 1)[0])}
    assert not things & unseen and len(things) > 150
    prompts = (ROOT / 'assets/toy/data/prompts_unseen.txt').read_text().splitlines()
    assert all(any(u in p for u in unseen) for p in prompts)


def test_assets_stay_small():
    assert sum(f.lstat().st_size for f in (ROOT / 'assets').rglob('*') if f.is_file()) < 40e6


def test_vae_keeps_held_out_pictures(toy):
    x = torch.from_numpy(make_toy.pictures(64, 2)[1]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        psnr = -10 * torch.log10((toy.decode(toy.latents(x)).clamp(-1, 1) - x).square().mean() / 4)
    assert psnr >= 28


def test_make_toy_runs_end_to_end_at_a_few_iterations(tmp_path):
    """The builder itself, every trained component for two iterations on a few pictures, and that a second call skips."""
    command = ['tests/make_toy.py', '--only', 'data', 'vae', 'sam', 'clip', 'teacher', 'pickscore', 'lrm', 'sd3', '--iters', 2,
               '--pictures', 300, '--pairs', 60,
               '--out', tmp_path / 'toy', '--work', tmp_path / 'work']
    done = start(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p.name for p in (tmp_path / 'toy').iterdir()} == {'data', 'sam.pth', 'clip', 'sdxl', 'pickscore', 'lrm', 'sd3'}
    base = m.Base(tmp_path / 'toy/sdxl')
    m.load_sam_encoder(str(tmp_path / 'toy/sam.pth')), m.load_latent_reward(tmp_path / 'toy/lrm', base)
    assert m.Base(tmp_path / 'toy/sd3').schedule.kind == 'flow'
    again = start(*command)
    assert again.returncode == 0 and again.stdout.count('done already') == 8
