"""
One's own model: a base LoRA, prompts without pictures; and the families beside SDXL and SD3.

    pytest tests/test_models.py
"""

import builtins
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from PIL import Image
from safetensors.torch import load_file, save_file

import bench
import model as m
from conftest import ROOT, inside, refused, rows, weights
from test_math import family, normal

TOY = ROOT / 'assets/toy/sdxl'
SHORT = ['--iters', 2, '--batch', 2, '--micro', 1, '--save_every', 2, '--sample_every', 0,
         '--log_every', 1, '--workers', 0, '--warmup', 0, '--cooldown', 0, '--save_dtype',
         'float32']

def run(out, *command):
    """Runs a script here; returns what it printed."""
    done = inside(*command, '--out', out)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

def drawn(file, *flags):
    """The picture that sample.py draws, (H, W, 3)."""
    run(file, 'sample.py', '--n', 1, '--prompt', 'a red star on blue', *flags)
    return np.asarray(Image.open(file), int)

# --------------------------------------------------------------------------------------------------
# a LoRA of one's own, merged into the teacher

@pytest.fixture(scope='module')
def style(toy, tmp_path_factory):
    """A folder of LoRA files of the toy SDXL, on attention and on the first text encoder: sound as
    diffusers and as kohya name them, and bad ones."""
    folder = tmp_path_factory.mktemp('style')
    stream = torch.Generator().manual_seed(0)
    layers = {f'unet.{k}': net for k, net in toy.teacher.named_modules() if k.endswith('.to_q')}
    layers |= {f'text_encoder.{k}': net for k, net in toy.pipe.text_encoder.named_modules()
               if k.endswith('layers.0.self_attn.q_proj')}
    found = {}
    for name, layer in layers.items():
        out, into = layer.weight.shape
        found[f'{name}.lora_A.weight'] = torch.randn(2, into, generator=stream)
        found[f'{name}.lora_B.weight'] = torch.randn(out, 2, generator=stream) * .05
    unet = {k: v for k, v in found.items() if k.startswith('unet.')}
    first, *_ = unet
    nan = {k: v * float('nan') if k == first else v for k, v in found.items()}
    for name, tensors in dict(
            sound=found, unet=unet, kohya=convert_state_dict_to_kohya(unet), nan=nan,
            other={k.replace('unet.', 'transformer.'): v for k, v in unet.items()},
            more=unet | {'unet.nowhere.to_q.lora_A.weight': torch.ones(2, 8),
                         'unet.nowhere.to_q.lora_B.weight': torch.ones(8, 2)},
            wide={k: torch.cat([v, v], 1) if 'lora_A' in k else v for k, v in unet.items()},
            dora=unet | {first.replace('lora_A.weight', 'dora_scale'): torch.ones(8)}).items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f'{name}.safetensors')
    (folder / 'short.safetensors').write_bytes((folder / 'sound.safetensors').read_bytes()[:300])
    (folder / 'pickle.safetensors').write_bytes(b'\x80\x04.')
    return folder

def test_a_base_lora_is_merged_before_anything_else(toy, style, tmp_path, group):
    """W + weight B A in the teacher and in copies of all weights, which are read anew; once in the
    text encoder, whoever reads how often; kohya's names are the same file. A student is saved with
    what was merged, though the file has gone, or is another by then."""
    tensors = load_file(style / 'sound.safetensors')
    file = tmp_path / 'mine.safetensors'
    shutil.copy(style / 'sound.safetensors', file)
    base = m.load_base(TOY, base_lora=[file, '.5'])
    copied = base.trainable()
    for change in (file.unlink, lambda: shutil.copy(style / 'kohya.safetensors', file)):
        change()
        facts = dict(base_model=str(TOY), recipe='toy', iteration=1, prompts=['a star'])
        lora = m.lora_config(base.teacher, 2, 2., 'attention')
        m.save_student(tmp_path / 'student', base, base.trainable(lora), base.schedule.steps(4),
                       'float32', facts, lora)
        saved = (tmp_path / 'student' / m.BASE_LORA).read_bytes()
        assert saved == (style / 'sound.safetensors').read_bytes()
    nets = {'unet.': [base.teacher, copied], 'text_encoder.': [base.pipe.text_encoder]}
    plain = {'unet.': toy.teacher, 'text_encoder.': toy.pipe.text_encoder}
    for prefix, found in nets.items():
        for net in found:
            assert {*net.state_dict()} == {*plain[prefix].state_dict()}
            for k, w in plain[prefix].state_dict().items():
                ends = [tensors.get(prefix + k.replace('weight', f'lora_{x}.weight')) for x in 'BA']
                want = w if ends[0] is None else w + .5 * ends[0] @ ends[1]
                assert torch.allclose(net.state_dict()[k], want, atol=1e-6), k
    # by default the weight is 1
    nets = [m.load_base(TOY, base_lora=[style / f'{name}.safetensors']).teacher.state_dict()
            for name in ('unet', 'kohya')]
    for k, w in nets[0].items():
        assert torch.allclose(w, nets[1][k], atol=1e-6)
    assert all(w.requires_grad and w.dtype == torch.float32 for w in copied.parameters())
    assert not any(w.requires_grad for w in base.teacher.parameters())

@pytest.fixture(scope='module')
def distilled(style, tmp_path_factory):
    """Stage 1 with adapters over a base LoRA whose file is gone afterwards, on prompts alone."""
    folder = tmp_path_factory.mktemp('distilled')
    file, prompts = folder / 'mine.safetensors', folder / 'prompts.txt'
    shutil.copy(style / 'sound.safetensors', file)
    prompts.write_text('a red star on blue\na green ring\n')
    command = ['train_stage1.py', '--recipe', 'toy', *SHORT, '--lora', 4, '--base_lora', file, .8,
               '--prompts_only', prompts]
    said = run(folder / 'run', *command)
    done = refused(*[.5 if x == .8 else x for x in command], '--out', folder / 'run')
    assert f"holds a run of --base_lora ['{file}', '0.8'], not ['{file}', '0.5']" in done.stderr
    file.rename(folder / 'moved')
    return folder, said

def test_prompts_alone_are_enough(distilled):
    folder, said = distilled
    assert 'prompts.txt: 2 prompts, no pictures' in said
    assert '--gan none' in said
    first, second = rows(folder / 'run')
    assert any(k.startswith('dm/') for k in first) and 'fake' in second
    assert {k.split('.')[0] for k in weights(folder / 'run', 2)} == {'student', 'fake'}

def test_a_student_brings_its_base_lora(distilled, style, toy, tmp_path):
    """sample.py, its teacher, its merged pipeline, plain diffusers by the card's lines and stage 2
    have the LoRA beneath the student, from the student's own folder."""
    folder, _ = distilled
    student = folder / 'run/student'
    card = (student / 'README.md').read_text()
    assert str(folder) not in card and 'base_lora.safetensors`, at strength 0.8' in card
    assert json.loads((student / 'student.json').read_text())['base_lora'] == [m.BASE_LORA, .8]
    _, facts = m.find_student(str(folder / 'run'))
    pipe = m.load_student(student, facts, torch.float32)
    taught = m.load_base(TOY, base_lora=[style / 'sound.safetensors', .8])
    lora = m.lora_config(taught.teacher, 4, 8., 'attention')
    net = taught.trainable(lora)
    m.restore_student(taught, net, student, lora)
    x, t = normal(1, *toy.latent_shape), toy.schedule.steps(4)[1:2]
    y = taught.encode(['a star'])
    with torch.no_grad():
        ours = taught.predict(net, x, t, y)
        assert torch.allclose(taught.predict(pipe.unet, x, t, y), ours, atol=1e-4)
        assert (toy.predict(toy.teacher, x, t, y) - ours).abs().max() > .01
    ours = drawn(tmp_path / 'a.png', '--ckpt', student)
    run(tmp_path / 'whole', 'sample.py', '--ckpt', student, '--merge', tmp_path / 'whole')
    assert np.abs(drawn(tmp_path / 'b.png', '--ckpt', tmp_path / 'whole') - ours).max() <= 1
    teacher = drawn(tmp_path / 'c.png', '--ckpt', tmp_path / 'whole', '--teacher', '--steps', 4)
    plain = drawn(tmp_path / 'd.png', '--ckpt', 'assets/toy/student', '--teacher', '--steps', 4)
    assert np.abs(teacher - plain).mean() > 1
    said = run(tmp_path / 'e.json', 'evaluate.py', '--ckpt', student, '--teacher', '--n', 2,
               '--teacher_steps', 2, '--metrics', 'clip')
    assert 'sdxl with its base LoRA, 2 steps' in said
    run(tmp_path / 'two', 'train_stage2.py', '--init', folder / 'run', *SHORT, '--eval_every', 2,
        '--eval_n', 4, '--reward', 'pickscore', '--real', '')
    told = json.loads((tmp_path / 'two/args.json').read_text())
    assert told['base_lora'] == [str(student / m.BASE_LORA), .8]
    assert told['prompts_only'] == str(folder / 'prompts.txt')
    last = rows(tmp_path / 'two', 'eval.jsonl')[-1]
    assert 'rprecision' in last and 'cmmd' not in last
    assert (tmp_path / 'two/student' / m.BASE_LORA).exists()

@pytest.mark.parametrize('flags, says', [
    (['--base_lora', 'TMP/none.safetensors'], '--base_lora TMP/none.safetensors is not there'),
    (['--base_lora', 'TMP'], 'or no file'),
    (['--base_lora', 'TMP/sound.safetensors', 'much'], 'is not a file and one weight'),
    (['--base_lora', 'TMP/sound.safetensors', 1, 2], 'is not a file and one weight'),
    (['--base_lora', 'TMP/sound.safetensors', 'nan'], 'is not a file and one weight'),
    (['--base_lora', 'TMP/short.safetensors'], 'is no plain LoRA in safetensors'),
    (['--base_lora', 'TMP/pickle.safetensors'], 'is no plain LoRA in safetensors'),
    (['--base_lora', 'TMP/other.safetensors'], 'it is of another base model'),
    (['--base_lora', 'TMP/more.safetensors'], '14 of its 15 modules are there'),
    (['--base_lora', 'TMP/wide.safetensors'], 'could not be merged'),
    (['--base_lora', 'TMP/dora.safetensors'], 'dora_scale is of a DoRA'),
    (['--base_lora', 'TMP/nan.safetensors'], 'could not be merged'),
    (['--base_lora', 'assets/toy/sdxl/vae/diffusion_pytorch_model.safetensors'],
     'it has no pairs of factors'),
    (['--prompts_only', 'TMP/none.txt'], '--prompts_only TMP/none.txt cannot be read as text'),
    (['--prompts_only', 'assets/prompts.txt', '--gan', 'pixel'], 'use --gan none'),
    (['--prompts_only', 'assets/prompts.txt', '--data', 'assets/toy/data'], 'leave --data away')])
def test_bad_input_is_one_sentence(flags, says, style, tmp_path):
    flags = [str(x).replace('TMP', str(style)) for x in flags]
    done = refused('train_stage1.py', '--recipe', 'toy', *flags, '--out', tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
    assert says.replace('TMP', str(style)) in done.stderr

def test_the_plan_knows_a_family_by_its_files(tmp_path, monkeypatch):
    """Whatever the recipe: a folder's or the hub's cache's model_index.json, the names in one file;
    else by the recipe."""
    def planned(recipe, model):
        return m.gigabytes(bench.settings(recipe, model=str(model), lora=32), 1, 1, True)

    folder, hub = tmp_path / 'pipe', tmp_path / 'models--owner--name'
    for place in (folder / 'transformer', hub / 'snapshots/1', hub / 'refs'):
        place.mkdir(parents=True)
    (hub / 'refs/main').write_text('1')
    save_file({'w': torch.zeros(1000)}, folder / 'transformer/a.safetensors')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    by_recipe = {k: [planned(k, folder), planned(k, 'owner/name')] for k in m.SIZES}
    assert all(x[0] != y[0] for x, y in itertools.combinations(by_recipe.values(), 2))
    kinds = dict(StableDiffusionXLPipeline='sdxl', StableDiffusion3Pipeline='sd3',
                 QwenImagePipeline='qwen', ZImagePipeline='zimage')
    for name in (*kinds, 'AnotherPipeline'):
        for place in (folder, hub / 'snapshots/1'):
            (place / 'model_index.json').write_text(json.dumps({'_class_name': name}))
        for recipe in m.SIZES:
            found = [planned(recipe, folder), planned(recipe, 'owner/name')]
            assert found == by_recipe[kinds.get(name, recipe)]
    file = tmp_path / 'one.safetensors'
    for key, recipe in dict(joint_blocks='sd3', unet='sdxl').items():
        save_file({f'{key}.0.weight': torch.zeros(1)}, file)
        assert planned('qwen', file) == planned(recipe, 'owner/other')

def test_offloaded_encoders_count_while_they_encode():
    """A crop makes activations smaller than the encoders, which are on the card by turns."""
    for family, billions in ('sd3', .818 + 4.762), ('qwen', 8.292):
        flags = bench.settings(family, lora=64, offload=True, gan_crop=256)
        assert m.gigabytes(flags, 1, 1, True)['activations'] == pytest.approx(2 * billions)

# --------------------------------------------------------------------------------------------------
# Qwen-Image and Z-Image

PROMPTS = ['a red circle on blue', 'a striped white star above a green ring on black']
GUIDED = dict(qwen=dict(negative_prompt=' ', true_cfg_scale=4.), zimage=dict(guidance_scale=3.))

@pytest.fixture(scope='module', params=['qwen', 'zimage'])
def name(request):
    return request.param

@pytest.fixture(scope='module')
def base(name):
    return family(name)

def test_guidance_is_the_pipelines_own_step(base):
    """x0 of the teacher, guided and not, is where each of the pipeline's Euler steps leads: for
    prompts of different lengths, alone and in a batch, where one is padded."""
    noise = normal(2, *base.latent_shape)
    for prompts, cfg in ((PROMPTS, 4.), (PROMPTS[1:], 4.), (PROMPTS, 1.)):
        n = len(prompts)
        seen = [base.pack(noise[-n:])]

        def keep(pipe, k, t, found):
            seen.append(found['latents'])
            return {}

        base.pipe([*prompts], latents=seen[0], num_inference_steps=3, output_type='latent',
                  callback_on_step_end=keep, **base.called(base.pipe, cfg, n))
        sigmas = base.pipe.scheduler.sigmas
        assert len(seen) == 4 and sigmas[0] == 1
        y = base.encode(prompts)
        for k, (x, end) in enumerate(zip(seen, seen[1:])):
            theirs = x - sigmas[k] * (end - x) / (sigmas[k + 1] - sigmas[k])
            t = (1000 * sigmas[k]).expand(n)
            with torch.no_grad():
                ours = base.x0(base.teacher, base.unpack(x), t, y, cfg)
            assert torch.allclose(base.pack(ours), theirs, atol=1e-5)

def test_the_teachers_row_is_the_pipelines_picture(base, name, group):
    noise = normal(2, *base.latent_shape)
    ours = base.teacher_samples(PROMPTS, noise, 3, 4., 1)
    for prompt, x, picture in zip(PROMPTS, noise, ours):
        theirs = base.pipe(prompt, height=64, width=64, num_inference_steps=3, output_type='pt',
                           latents=base.pack(x[None]), **GUIDED[name])
        assert torch.allclose((picture / 2 + .5).clamp(0, 1), theirs.images[0], atol=1e-4)

def test_features_are_the_pictures_tokens(base):
    """Whatever the text behind them, each in its place: a changed latent changes its own most."""
    x, t, y = normal(1, *base.latent_shape), base.schedule.steps(4)[1:2], base.encode(PROMPTS[1:])
    with torch.no_grad():
        before = base.features(base.teacher, x, t, y)[-1]
        assert before.shape == (1, *base.channels(base.teacher)[-1:], 4, 4)
        for row, column in ((6, 1), (1, 4), (3, 7)):
            changed = x.clone()
            changed[..., row, column] += 1
            after = base.features(base.teacher, changed, t, y)[-1]
            most = (after - before).norm(dim=1).argmax()
            assert divmod(most.item(), 4) == (row // 2, column // 2)

@pytest.mark.parametrize('name', ['qwen'], indirect=True)
def test_its_vae_without_cache_and_with_checkpoints(base):
    """A picture is what a video's decoder makes of one frame; latents are the inverse's; block by
    block checkpointed, the gradient is the same."""
    z = normal(2, *base.latent_shape).requires_grad_()
    mean, std = (torch.tensor(x).view(1, 16, 1, 1, 1) for x in (
        base.vae.config.latents_mean, base.vae.config.latents_std))
    ours = base.decode(z)
    theirs = base.vae.decode(z[:, :, None] * std + mean).sample[:, :, 0]
    assert torch.allclose(ours.clamp(-1, 1), theirs, atol=1e-5)
    found = (base.vae.encode(ours[:, :, None]).latent_dist.mean - mean) / std
    assert torch.allclose(base.latents(ours), found[:, :, 0], atol=1e-5)
    plain, = torch.autograd.grad(ours.square().sum(), z)
    other = m.load_base(base.name)
    other.vae.enable_gradient_checkpointing()
    calls = []
    hook = other.vae.decoder.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(1))
    again, = torch.autograd.grad(other.decode(z).square().sum(), z)
    hook.remove()
    assert len(calls) == 2                                    # once more for the backward pass
    assert torch.allclose(plain, again, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('name', ['qwen'], indirect=True)
def test_its_steps_are_shifted_by_the_number_of_tokens(base):
    """As its own scheduler shifts them: 16 tokens here, 4096 at 1024 px."""
    for tokens, schedule in ((16, base.schedule), (4096, m.Schedule(base.pipe.scheduler))):
        mu = .5 + (tokens - 256) / (8192 - 256) * .4
        assert schedule.shift == pytest.approx(math.exp(mu))
        scheduler = type(base.pipe.scheduler).from_config(
            base.pipe.scheduler.config, shift_terminal=None)
        scheduler.set_timesteps(sigmas=[1, .75, .5, .25], mu=mu)
        assert torch.allclose(schedule.steps(4), scheduler.timesteps, atol=1e-3)

def test_half_precision_is_wide_enough(base, monkeypatch):
    """As it is drawn on a card; SDXL's and SD3's is finer. The card's lines have it as well."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    facts = dict(base_model=base.name, steps=[1000], prompts=['a star'])
    for name, family, half in (
            (base.name, type(base), torch.bfloat16), (TOY, m.SDXL, torch.float16),
            (ROOT / 'assets/toy/sd3', m.SD3, torch.float16)):
        pipe = m.load_pipeline(name, '--ckpt')
        assert {net.dtype for net in (m.network_of(pipe), pipe.vae, pipe.text_encoder)} == {half}
        assert f'dtype = {half} if cuda' in '\n'.join(m.snippet(facts, family))

def test_every_script_takes_it(base, name, tmp_path, monkeypatch):
    """Both GANs, all weights, saved adapters, which plain diffusers draws with by the card's lines,
    sampling, merging, evaluation, rewards of pictures; no latent reward, no --compile of one."""
    out = tmp_path / 'run'
    said = run(out, 'train_stage1.py', '--recipe', 'toy-sd3', '--model', base.name, '--cfg', 4,
               '--lora', 4, '--grad_checkpointing', *SHORT)
    steps = dict(qwen='[1000, 830, 619, 351]', zimage='[1000, 900, 750, 500]')
    assert f'steps {steps[name]}' in said
    assert {'gan/d', 'fake', 'grad/gan'} <= rows(out)[-1].keys()
    run(tmp_path / 'latent', 'train_stage1.py', '--recipe', 'toy-sd3', '--model', base.name,
        '--lora', 0, '--student_lr', 1e-4, '--fake_lr', 1e-4, '--gan', 'latent', *SHORT)
    assert rows(tmp_path / 'latent')[0]['grad/gan'] > 0
    whole = base.trainable()
    m.restore_student(base, whole, tmp_path / 'latent/student', None)
    state = weights(tmp_path / 'latent', 2)
    for k, w in m.trained(whole).items():
        assert torch.equal(w, state[f'student.weight/{k}'])
    frozen = {k for k, w in whole.named_parameters() if not w.requires_grad}
    assert len(frozen) == dict(qwen=6, zimage=0)[name]
    told = json.loads((out / 'student/student.json').read_text())
    code, = re.findall(r'```python\n(.*?)```', (out / 'student/README.md').read_text(), re.S)
    with monkeypatch.context() as patch:
        patch.chdir(out / 'student')
        builtins.exec(code.replace('pipe(prompt, ', 'torch.manual_seed(0)\npipe(prompt, height=64, '
                                   'width=64, '), {})
        patch.setattr(m, 'generator', lambda *key: torch.Generator().manual_seed(0))
        run(f'{tmp_path}/0/', 'sample.py', '--ckpt', out, '--prompt', told['prompts'][0], '--n', 1)
    theirs, ours = (np.asarray(Image.open(file), int) for file in (
        out / 'student/picture.png', tmp_path / '0/00000.png'))
    assert np.abs(theirs - ours).max() <= 1 and ours.std() > 1
    ours = drawn(tmp_path / 'a.png', '--ckpt', out)
    run(tmp_path / 'whole', 'sample.py', '--ckpt', out, '--merge', tmp_path / 'whole')
    assert np.abs(drawn(tmp_path / 'b.png', '--ckpt', tmp_path / 'whole') - ours).max() <= 1
    drawn(tmp_path / 'c.png', '--ckpt', out, '--teacher', '--steps', 2)
    said = run(tmp_path / 'e.json', 'evaluate.py', '--ckpt', out, '--teacher', '--n', 2,
               '--teacher_steps', 2, '--metrics', 'clip', 'spectrum', '--real_vae', base.name,
               '--n_real', 2)
    assert '2 steps, CFG 3' in said
    stage_2 = ['train_stage2.py', '--init', out, *SHORT, '--eval_every', 0]
    run(tmp_path / 'two', *stage_2, '--reward', 'pickscore')
    assert 'rl/loss' in rows(tmp_path / 'two')[-1]
    for script in (['sample.py', '--ckpt', out], stage_2) if name == 'zimage' else ():
        done = refused(*script, '--compile', '--out', tmp_path / 'none')
        assert done.returncode == 2 and 'a graph for each set of lengths' in done.stderr
    done = refused(*stage_2, '--reward', 'latent', '--lrm', 'assets/toy/lrm_sd3', '--out', tmp_path)
    assert done.returncode == 2 and '--reward pickscore reads pictures' in done.stderr
