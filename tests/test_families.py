"""
SD3 beside SDXL, LoRA for both, and the sizes of the published models.

    pytest tests/test_families.py
"""

import builtins
import copy
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL, AutoencoderKLQwenImage, DDPMScheduler, FlowMatchEulerDiscreteScheduler,
    QwenImageTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel,
    ZImageTransformer2DModel)
from diffusers.loaders import single_file_utils as single_file
from diffusers.utils import convert_state_dict_to_kohya
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bench
import model as m
from bench import MMDIT, UNET, VAE_OF
from conftest import (
    ROOT, alone, equal, far_from_one_step, inside, listing, refused, rows, start, weights)
from test_math import bare, family, normal

PROMPTS = ['a red circle on blue', 'a striped white star above a green ring on black']

@pytest.fixture(params=['sdxl', 'sd3', 'qwen', 'zimage'])
def base(request):
    return family(request.param)

def place(base, k=1):
    """Two prompts and two noisy latents at the student's step k: (x_t, t, y)."""
    return normal(2, *base.latent_shape), base.schedule.steps(4)[k].expand(2), base.encode(PROMPTS)

# --------------------------------------------------------------------------------------------------
# SD3

def test_sd3s_conditioning_is_diffusers():
    """base.predict is the pipeline's own call of its transformer, under guidance with the encoded
    empty prompt."""
    base = family('sd3')
    caught = []
    hook = base.teacher.register_forward_hook(
        lambda net, args, kwargs, out: caught.append((kwargs, out[0])), with_kwargs=True)
    base.pipe(PROMPTS, latents=normal(2, *base.latent_shape), num_inference_steps=2,
              guidance_scale=5., output_type='latent', **m.text_length(base.pipe))
    hook.remove()
    kwargs, out = caught[0]
    y = base.encode(PROMPTS)
    for name, u, c in zip(['encoder_hidden_states', 'pooled_projections'], base.uncond, y):
        assert torch.allclose(kwargs[name], torch.cat([u.expand_as(c), c]), atol=1e-5)
        assert u.abs().sum() > 0
    x, t = kwargs['hidden_states'], kwargs['timestep']
    with torch.no_grad():
        assert torch.allclose(base.predict(base.teacher, x[2:], t[2:], y), out[2:], atol=1e-4)
        ours = base.x0(base.teacher, x[:2], t[:2], y, 5.)
    u, c = out.chunk(2)
    assert torch.allclose(ours, x[:2] - (t[0] / 1000) * (u + 5 * (c - u)), atol=1e-3)

def test_shift_factor_is_undone():
    """decode(latents(pixels)) is the VAE's own reconstruction where latents are shifted and
    scaled."""
    base = family('sd3')
    config = base.vae.config
    assert config.shift_factor
    x = normal(2, 3, 64, 64).clamp(-1, 1)
    with torch.no_grad():
        z = base.vae.encode(x).latent_dist.mean
        scaled = (z - config.shift_factor) * config.scaling_factor
        assert torch.allclose(base.latents(x), scaled, atol=1e-5)
        assert torch.allclose(base.decode(base.latents(x)), base.vae.decode(z).sample, atol=1e-4)

def with_t5(folder):
    """The toy SD3 with a T5 of random weights and a tokenizer of letters."""
    from tokenizers import Tokenizer, models
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast
    pipe = m.load_pipeline(ROOT / 'assets/toy/sd3', '', torch.float32)
    letters = ['<pad>', '</s>', '<unk>', *'abcdefghijklmnopqrstuvwxyz']
    words = Tokenizer(models.Unigram([(x, 0.) for x in letters], unk_id=2))
    tokenizer = T5TokenizerFast(tokenizer_object=words, extra_ids=0)
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(letters), d_model=160, d_kv=32, d_ff=64, num_layers=1, num_heads=2))
    parts = dict(pipe.components, text_encoder_3=t5, tokenizer_3=tokenizer)
    type(pipe)(**parts).save_pretrained(folder)
    return folder

def test_t5_can_be_left_away(tmp_path):
    """With its T5 the context is CLIP's tokens and 256 more; without, CLIP's and as many zeros;
    offload changes nothing, and the encoders wait on the CPU."""
    folder = with_t5(tmp_path / 'sd3')
    whole, without = m.load_base(folder), m.load_base(folder, t5=False)
    moved = m.load_base(folder, t5=True, offload=True)
    clip = whole.pipe.tokenizer_max_length
    assert whole.encode(PROMPTS)[0].shape == (2, clip + 256, 160)
    assert len(whole.encoders) == 3
    y = without.encode(PROMPTS)[0]
    assert y.shape == (2, 2 * clip, 160)
    assert (y[:, clip:] == 0).all()
    assert len(without.encoders) == 2
    assert len(moved.waiting) == 3
    assert not whole.waiting
    for a, b in zip(whole.encode(PROMPTS), moved.encode(PROMPTS)):
        assert torch.equal(a, b)

def test_half_of_one_block_is_that_block():
    """What --gan latent looks at in a transformer of one block."""
    base = family('sd3')
    net = SD3Transformer2DModel.from_config(dict(base.teacher.config, num_layers=1))
    found = base.features(net, *place(base))
    assert [x.shape[1] for x in found] == base.channels(net) == [net.inner_dim]

# --------------------------------------------------------------------------------------------------
# both families' sampling

def exported(base, folder, lora=None, student=None):
    """The pipeline that load_student makes of what save_student writes, fp32."""
    folder.mkdir(exist_ok=True)
    facts = dict(base_model=base.name, iteration=3, recipe='toy', prompts=['a star'])
    with alone():
        m.save_student(folder / 'student', base, student or base.teacher, base.schedule.steps(4),
                       'float32', facts, lora)
    found, facts = m.find_student(str(folder))
    pipe = m.load_student(found, facts, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe, facts

def test_three_samplers_agree(base, tmp_path, monkeypatch):
    """backward_simulation, diffusers' pipeline with the exported scheduler, and the closed form
    alpha x0 + sigma noise."""
    steps = base.schedule.steps(4)
    alpha, sigma = base.schedule.alpha(steps), base.schedule.sigma(steps)
    noise = normal(2, 4, *base.latent_shape)
    pipe, _ = exported(base, tmp_path)
    y = base.encode(PROMPTS)
    with torch.no_grad():
        ours = base.decode(m.backward_simulation(base, base.teacher, steps, noise, y))
        x = noise[:, 0]
        for k, t in enumerate(steps):
            out = base.predict(base.teacher, x, t.expand(2), y)
            x0 = x - sigma[k] * out
            if base.schedule.kind == 'epsilon':
                x0 = x0 / alpha[k]
            if k < 3:
                x = alpha[k + 1] * x0 + sigma[k + 1] * noise[:, k + 1]
        assert torch.allclose(base.decode(x0), ours, atol=1e-4)
    import diffusers.schedulers.scheduling_flow_match_lcm as flow
    import diffusers.schedulers.scheduling_lcm as lcm
    packed = [base.pack(x) for x in (*noise[:, 1:].unbind(1), noise[:, 0])]
    fresh = iter(packed)                                   # a flow's draws at its last step too
    for module in (flow, lcm):
        monkeypatch.setattr(module, 'randn_tensor', lambda *a, **k: next(fresh))
    how = dict(sigmas=[1, .75, .5, .25]) if base.part == 'transformer' else {}
    theirs = pipe(PROMPTS, latents=packed[-1], output_type='pt', num_inference_steps=4, **how,
                  **base.called(pipe, 0., 2)).images
    assert torch.allclose(pipe.scheduler.timesteps.float(), steps, atol=1e-3)
    assert torch.allclose(theirs, (ours / 2 + .5).clamp(0, 1), atol=2e-3)

def test_a_pictures_noise_depends_on_its_index_alone(base, tmp_path):
    """SD3's pipeline gives its stochastic scheduler no generator; generate() does."""
    pipe, _ = exported(base, tmp_path)
    both = m.generate(pipe, PROMPTS, [3, 8], 0, 4, 0.)
    assert torch.allclose(m.generate(pipe, PROMPTS[1:], [8], 0, 4, 0.), both[1:], atol=1e-3)
    assert (m.generate(pipe, PROMPTS[1:], [9], 0, 4, 0.) - both[1:]).abs().mean() > .01

def test_v_prediction_is_distilled_as_well(tmp_path):
    """An SDXL pipeline whose scheduler says v_prediction: x0 and target are v's (test_math.py), and
    the exported scheduler says so too."""
    folder = tmp_path / 'v'
    shutil.copytree(ROOT / 'assets/toy/sdxl', folder)
    file = folder / 'scheduler/scheduler_config.json'
    told = json.loads(file.read_text()) | dict(prediction_type='v_prediction')
    file.write_text(json.dumps(told))
    base = m.load_base(folder)
    assert base.schedule.kind == 'v_prediction'
    pipe, _ = exported(base, tmp_path)
    assert pipe.scheduler.config.prediction_type == 'v_prediction'

# --------------------------------------------------------------------------------------------------
# LoRA

def adapted(base, seed=0, alpha=8.):
    """A network with the base's tensors and adapters that are not zero."""
    torch.manual_seed(seed)
    net = base.trainable(m.lora_config(base.teacher, 4, alpha, 'attention'))
    for w in m.trained(net).values():
        nn.init.normal_(w, std=.1)
    return net

def test_adapters_do_not_leak(base):
    """Student and fake score hold the teacher's own tensors; training either changes nothing in
    the other two, nor does copying adapters; a twin has adapters of its own."""
    student, fake = adapted(base), adapted(base, seed=1)
    own = {w.data_ptr() for w in base.teacher.parameters()}
    for net in (student, fake):
        assert {w.data_ptr() for w in net.parameters() if not w.requires_grad} == own
        assert m.trained(net)
        assert all('lora' in k and w.dtype == torch.float32 for k, w in m.trained(net).items())
    at = place(base)
    with torch.no_grad():
        teacher, other, mine = (base.predict(net, *at) for net in (base.teacher, fake, student))
    assert (teacher - other).abs().max() > 1e-3
    assert (mine - other).abs().max() > 1e-3
    opt = torch.optim.AdamW(m.trained(student).values(), lr=.01)
    base.predict(student, *at).square().mean().backward()
    assert all(w.grad is None for w in [*base.teacher.parameters(), *fake.parameters()])
    assert m.update(opt, student) > 0
    with torch.no_grad():
        assert torch.equal(base.predict(base.teacher, *at), teacher)
        assert torch.equal(base.predict(fake, *at), other)
        assert not torch.equal(base.predict(student, *at), mine)
        m.load_trained(fake, m.trained(student))
        assert torch.equal(base.predict(base.teacher, *at), teacher)
        assert torch.equal(base.predict(fake, *at), base.predict(student, *at))
        reference = m.twin(student).requires_grad_(False)
        assert torch.equal(base.predict(reference, *at), base.predict(student, *at))
    trained = {w.data_ptr() for w in m.trained(student).values()}
    assert not trained & {w.data_ptr() for w in reference.parameters()}

def test_checkpointing_gives_the_same_gradients(base):
    nets = adapted(base), adapted(base)
    nets[1].enable_gradient_checkpointing()
    for net in nets:
        base.predict(net, *place(base, 2)).square().mean().backward()
    for (k, a), b in zip(m.trained(nets[0]).items(), m.trained(nets[1]).values()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-7)
        # SD3's last block throws the text's answer away
        assert a.grad.abs().sum() > 0 or 'add_q_proj' in k

def test_an_adapter_of_full_rank_is_full_fine_tuning():
    """W + B A with A = 1 and B trained, against W trained: the same weights after five AdamW steps
    of an eps loss."""
    from peft import inject_adapter_in_model

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return torch.tanh(self.to_q(x))

    torch.manual_seed(0)
    full = Net()
    other = inject_adapter_in_model(m.lora_config(full, 6, 6., 'to_q'), copy.deepcopy(full))
    layer = other.to_q
    with torch.no_grad():
        layer.lora_A.default.weight.copy_(torch.eye(6))
    layer.lora_A.default.weight.requires_grad_(False)
    opts = [torch.optim.AdamW(m.trained(net).values(), lr=.05, weight_decay=0.)
            for net in (full, other)]
    for k in range(5):
        x, eps = normal(2, 32, 6, seed=k)
        for net, opt in zip((full, other), opts):
            F.mse_loss(net(x), eps).backward()
            m.update(opt, net)
    old = layer.base_layer.weight
    merged = old + layer.lora_B.default.weight @ layer.lora_A.default.weight
    assert torch.allclose(merged, full.to_q.weight, atol=1e-5)
    assert (merged - old).abs().max() > .1

@pytest.mark.parametrize('alpha', [8., 2.])
def test_a_saved_lora_is_the_student_at_scale_one(base, tmp_path, alpha):
    """load_lora_weights on the plain base pipeline, whatever alpha was trained with, and back into
    a network to train on."""
    student = adapted(base, alpha=alpha)
    lora = m.lora_config(base.teacher, 4, alpha, 'attention')
    pipe, facts = exported(base, tmp_path, lora, student)
    without = dict(text_encoder_3=None, tokenizer_3=None) if type(base) is m.SD3 else {}
    plain = diffusers.DiffusionPipeline.from_pretrained(base.name, **without)
    plain.load_lora_weights(tmp_path / 'student')
    at = place(base)
    with torch.no_grad():
        ours = base.predict(student, *at)
        assert torch.allclose(ours, base.predict(m.network_of(plain), *at), atol=1e-4)
        assert torch.allclose(ours, base.predict(m.network_of(pipe), *at), atol=1e-4)
        assert (ours - base.predict(base.teacher, *at)).abs().max() > 1e-2
        again = base.trainable(lora)
        m.restore_student(base, again, tmp_path / 'student', lora)
        assert torch.allclose(base.predict(again, *at), ours, atol=1e-5)
    assert torch.allclose(m.Schedule(pipe.scheduler).steps(4), base.schedule.steps(4))
    assert (facts['lora']['rank'], facts['lora']['alpha']) == (4, alpha)
    kept = json.loads((tmp_path / 'student/scheduler/scheduler_config.json').read_text())
    names = dict(unet='LCMScheduler', transformer='FlowMatchLCMScheduler')
    assert kept['_class_name'] == type(pipe.scheduler).__name__ == names[base.part]
    assert kept.get('original_inference_steps', 1000) == 1000

def in_half(base):
    """The base in bf16 under autocast, as on CUDA."""
    half = m.load_base(base.name, dtype=torch.bfloat16)
    half.autocast = lambda: torch.autocast('cpu', torch.bfloat16)
    return half

def test_half_precision(base):
    """Adapters on a bf16 base stay fp32, get gradients, and begin as the teacher. A bf16 reference
    is the student bit for bit, whole or adapted, so the first ratios of stage 2 are 1 at half the
    memory; the student stays as it is."""
    half = in_half(base)
    at = place(half)
    lora = m.lora_config(half.teacher, 4, 8., 'attention')
    net = half.trainable(lora)
    out = half.predict(net, *at)
    with torch.no_grad():
        assert torch.allclose(out, half.predict(half.teacher, *at), atol=1e-6)
    out.square().mean().backward()
    assert all(w.dtype == w.grad.dtype == torch.float32 for w in m.trained(net).values())
    assert {w.dtype for w in net.parameters() if not w.requires_grad} == {torch.bfloat16}
    for net in (half.trainable(), net):
        torch.manual_seed(0)
        for w in m.trained(net).values():
            w.data += .05 * torch.randn_like(w)
        before = {k: w.clone() for k, w in m.trained(net).items()}
        reference = m.twin(net, torch.bfloat16).requires_grad_(False)
        with torch.no_grad():
            assert torch.equal(half.predict(reference, *at), half.predict(net, *at))
        assert equal(m.trained(net), before)
        assert {w.dtype for w in m.trained(net).values()} == {torch.float32}
        kinds = {k: w.dtype for k, w in reference.named_parameters()}
        assert torch.bfloat16 in {kinds[k] for k in before}

# --------------------------------------------------------------------------------------------------
# what others do with a student

def python_blocks(text):
    return re.findall(r'```python\n(.*?)```', text, re.S)

BLOCKS = [block for page in ('README.md', 'assets/running.md', 'assets/results.md')
          for block in python_blocks((ROOT / page).read_text())]

@pytest.fixture(scope='session')
def students(tmp_path_factory):
    """Students as runs save them by default, in float16: out/stage1 of all weights and with
    adapters, out/stage1-sd3; and what the published bases' names stand for."""
    folder = tmp_path_factory.mktemp('students')
    found = {'assets/toy': str(ROOT / 'assets/toy'), 'lora': str(folder / 'lora/student'),
             'stabilityai/stable-diffusion-xl-base-1.0': str(ROOT / 'assets/toy/sdxl'),
             'stabilityai/stable-diffusion-3-medium-diffusers': str(with_t5(folder / 'sd3')),
             'out/stage1/student': str(folder / 'whole/student'),
             'out/stage1-sd3/student': str(folder / 'flow/student')}
    for name, path, rank in (('whole', ROOT / 'assets/toy/sdxl', 0),
                             ('lora', ROOT / 'assets/toy/sdxl', 4), ('flow', folder / 'sd3', 4)):
        base = m.load_base(path)
        lora = m.lora_config(base.teacher, rank, rank, 'attention') if rank else None
        (folder / name).mkdir()
        (folder / name / 'args.json').write_text(json.dumps(dict(batch=64, out='/home/me')))
        m.picture_grid([torch.zeros(1, 3, 8, 8)], ['x'], folder / name / 'samples-0000001.png')
        facts = dict(base_model=str(path), iteration=3, recipe='toy', prompts=PROMPTS, t5=None)
        with alone():
            m.save_student(
                folder / name / 'student', base, adapted(base, 4, 4.) if rank else base.teacher,
                base.schedule.steps(4), 'float16', facts, lora)
    return found

def typed(code, folder, monkeypatch, capfd):
    """Runs a block as a user would, in `folder`; what it said about schedulers or dtypes."""
    monkeypatch.chdir(folder)
    code = compile(code, 'block', 'exec')
    builtins.exec(code, {})                                            # our own pages, not a file
    said = capfd.readouterr()
    return [line for line in (said.out + said.err).splitlines()
            if 'config attributes' in line or 'Warning' in line or 'more than one' in line]

@pytest.mark.parametrize('block', BLOCKS)
def test_the_blocks_of_the_pages_run_and_draw_what_sample_does(
        block, students, tmp_path, monkeypatch, capfd):
    """As they stand but for paths, on students of the default --save_dtype; without a word on
    foreign settings; the picture is that of sample.py from the same noise."""
    adapters = 'load_lora_weights' in block
    folder, = {name for name in re.findall(r"'((?:out|assets/toy)/[\w/-]*student)'", block)}
    where = students['lora'] if adapters and folder == 'out/stage1/student' else None
    where = where or students.get(folder) or str(ROOT / folder)
    code = block.replace(folder, where)
    for name in ('stabilityai/stable-diffusion-xl-base-1.0', 'assets/toy/sdxl',
                 'stabilityai/stable-diffusion-3-medium-diffusers'):
        code = code.replace(f"'{name}'", repr(students.get(name, str(ROOT / name))))
    assert not typed(code, tmp_path, monkeypatch, capfd)
    prompt, = re.findall(r"pipe\('(.+?)'", block)
    monkeypatch.setattr(m, 'generator', lambda *key: torch.Generator().manual_seed(0))
    assert inside('sample.py', '--ckpt', where, '--prompt', prompt, '--n', 1, '--out',
                  f'{tmp_path}/ours/').returncode == 0
    theirs, = tmp_path.glob('*.png')
    a, b = (np.asarray(Image.open(file), int) for file in (theirs, tmp_path / 'ours/00000.png'))
    assert a.std() > 1
    assert np.abs(a - b).max() <= 1

@pytest.mark.parametrize(
    'script', ['train_stage1.py', 'train_stage2.py', 'sample.py', 'evaluate.py'])
def test_the_commands_of_the_pages_have_flags_that_exist(script):
    """In blocks, tables and sentences."""
    known = {*re.findall(r'--[\w-]+', inside(script, '--help').stdout)}
    found = {flag for page in ('README.md', 'assets/running.md', 'assets/results.md')
             for command in re.findall(rf'{script} ([^`\n#]*)', (ROOT / page).read_text())
             for flag in re.findall(r'(?<!\S)--[a-z][\w-]*', command)}
    assert found and found <= known, found - known

@pytest.mark.parametrize('name', ['out/stage1/student', 'lora', 'out/stage1-sd3/student'])
def test_a_student_has_a_card_whose_block_runs(name, students, monkeypatch, capfd):
    """In the student's own folder, as it stands; its head is what the hub reads."""
    folder = Path(students[name])
    text = (folder / 'README.md').read_text()
    head = ModelCard(text).data
    assert (head.library_name, head.pipeline_tag) == ('diffusers', 'text-to-image')
    assert 'not known here' in text and '"batch": 64' in text and 'samples.png' in text
    assert '/home/me' not in text
    assert (folder / 'samples.png').exists()
    block, = python_blocks(text)
    before = listing(folder)
    assert not typed(block, folder, monkeypatch, capfd)
    assert Image.open('picture.png').size == (64, 64)
    Path('picture.png').unlink()
    assert listing(folder) == before

def test_the_card_names_the_licence_of_a_known_base(tmp_path):
    facts = dict(base_model='stabilityai/stable-diffusion-xl-base-1.0', recipe='sdxl', iteration=1,
                 prompts=['x'], steps=[999], lora=dict(rank=4))
    m.write_facts(tmp_path, facts, m.SDXL, tmp_path)
    head = ModelCard.load(tmp_path / 'README.md').data
    assert head.license == 'openrail++'
    assert head.base_model == facts['base_model']
    assert head.base_model_relation == 'adapter'
    facts |= dict(base_model='stabilityai/stable-diffusion-3.5-medium', lora=None)
    m.write_facts(tmp_path, facts, m.SD3, tmp_path)
    head = ModelCard.load(tmp_path / 'README.md').data
    assert head.license_name == 'stabilityai-ai-community'
    assert facts['base_model'] in head.license_link

def test_comfyui_finds_every_module_at_full_size(students):
    """By its published rule, lora_unet_<diffusers' name with _>; alpha is the rank, so scale 1."""
    with torch.device('meta'):
        net = UNet2DConditionModel(**UNET)
    lora = m.lora_config(net, 4, 8., 'attention')
    net.add_adapter(lora)
    ours = {f'unet.{k.replace(".default", "")}': w for k, w in m.trained(net).items()}
    found = convert_state_dict_to_kohya(ours)
    modules = {k.rsplit('.lora_', 1)[0].removeprefix('unet.') for k in ours}
    assert len(modules) == 560
    assert found.keys() == {
        f'lora_unet_{k.replace(".", "_")}.{end}' for k in modules
        for end in ('lora_up.weight', 'lora_down.weight', 'alpha')}
    file = Path(students['lora'], m.COMFYUI)
    small = load_file(file)
    assert {v.item() for k, v in small.items() if k.endswith('alpha')} == {4}
    with safe_open(file, 'pt') as opened:
        words = opened.metadata()
    assert words['modelspec.architecture'] == 'stable-diffusion-xl-v1-base/lora'
    assert not Path(students['out/stage1-sd3/student'], m.COMFYUI).exists()

def test_one_file_in_the_original_layout(students, tmp_path):
    """diffusers' loader of such files gives back every network of a merged student."""
    student, file = students['lora'], tmp_path / 'x.safetensors'
    assert inside('sample.py', '--ckpt', student, '--merge', file).returncode == 0
    done = refused('sample.py', '--ckpt', students['out/stage1-sd3/student'], '--merge', f'{file}2'
                   '.safetensors')
    assert done.returncode == 2 and 'of SDXL alone' in done.stderr
    merged = m.load_student(*m.find_student(student), torch.float32)
    merged.fuse_lora()
    merged.unload_lora_weights()
    again = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(file), config=str(ROOT / 'assets/toy/sdxl'), dtype=torch.float32)
    for part in ('unet', 'vae', 'text_encoder', 'text_encoder_2'):
        ours, theirs = (getattr(pipe, part).state_dict() for pipe in (merged, again))
        assert ours.keys() == theirs.keys()
        for k, w in ours.items():
            assert torch.equal(w.half().float(), theirs[k].float()), (part, k)

def test_the_original_layout_at_full_size(students, tmp_path):
    """SDXL's UNet and VAE under the names that diffusers' converters undo."""
    done = inside('sample.py', '--ckpt', students['lora'], '--merge', tmp_path / 'whole')
    with torch.device('meta'):
        nets = bench.networks('sdxl')
    scheduler = DDPMScheduler(prediction_type='v_prediction')
    pipe = SimpleNamespace(scheduler=scheduler, **nets)
    found = done.page['original'](pipe)
    assert 'v_pred' in found and 'ztsnr' not in found
    first = 'model.diffusion_model.'
    for name in ('input_blocks.4.1.transformer_blocks.1.attn1.to_q.weight',
                 'input_blocks.3.0.op.bias', 'output_blocks.2.2.conv.weight', 'label_emb.0.2.bias',
                 'output_blocks.5.2.conv.weight', 'middle_block.1.proj_in.weight'):
        assert first + name in found
    assert found['conditioner.embedders.1.model.text_projection'].shape == (1280, 1280)
    back = single_file.convert_ldm_unet_checkpoint(dict(found), dict(pipe.unet.config))
    assert back.keys() == pipe.unet.state_dict().keys()
    vae = single_file.convert_ldm_vae_checkpoint(dict(found), dict(pipe.vae.config))
    assert {k: w.shape for k, w in vae.items()} == {
        k: w.shape for k, w in pipe.vae.state_dict().items()}

def test_single_pictures_and_their_text(students, tmp_path):
    """evaluate.py ties them by the prompt inside; other files in the folder are a sentence."""
    where = f'{tmp_path}/pictures/'
    command = ['sample.py', '--ckpt', students['lora'], '--n', 2, '--seed', 5, '--out', where]
    assert inside(*command).returncode == 0
    info = [Image.open(tmp_path / f'pictures/0000{i}.png').info['parameters'] for i in range(2)]
    assert info[1].startswith(
        f'{PROMPTS[1]}\nSteps: 4, Sampler: LCMScheduler, CFG scale: 0, Seed: 5')
    done = inside('evaluate.py', '--images', where, '--recipe', 'toy', '--metrics', 'clip', '--out',
                  tmp_path / 'x.json')
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'by the prompt inside each' in done.stdout
    assert 'has files in it' in refused(*command).stderr

def test_a_page_to_try_the_student_on(students, monkeypatch):
    """Without gradio a sentence; with it, by a stand-in of the two calls that are made, pictures
    that sample.py draws, on this machine alone."""
    monkeypatch.setitem(sys.modules, 'gradio', None)
    command = ['sample.py', '--ckpt', students['lora'], '--serve']
    assert '--serve needs gradio: pip install gradio' in refused(*command).stderr
    made = []

    class Interface:
        def __init__(self, draw, **how):
            self.draw = draw

        def launch(self, server_name, server_port):
            if server_port == 80:
                raise OSError('Cannot find empty port in range: 80-80')
            assert (server_name, server_port) == ('127.0.0.1', 7860)
            made.extend(self.draw('a red star on white', 3, 4, beside) for beside in (False, True))

    parts = {name: lambda *value, **how: None for name in (
        'Textbox', 'Number', 'Slider', 'Checkbox', 'Image')}
    monkeypatch.setitem(sys.modules, 'gradio', SimpleNamespace(Interface=Interface, **parts))
    assert inside(*command).returncode == 0
    done = refused(*command, '--port', 80)
    assert done.returncode == 2 and 'error: --port 80 cannot be had; choose another' in done.stderr
    (first, none, _), (again, teacher, words) = made
    assert none is None and first == again != teacher
    assert re.fullmatch('student: 4 steps, .* s, teacher: 50 steps, .* s', words)

def test_an_upload(students, monkeypatch):
    """Private where it is new; offline or not logged in it is one sentence."""
    calls = []

    class Api:
        def create_repo(self, name, **how):
            calls.append(how)
            return f'https://huggingface.co/{name}'

        def upload_folder(self, **how):
            calls.append(how)

    command = ['sample.py', '--ckpt', students['lora'], '--push_to_hub', 'me/x']
    done = refused(*command)
    assert done.returncode == 2
    assert '--push_to_hub me/x' in done.stderr and 'hf auth login' in done.stderr
    assert done.stderr.count('\n') == 1
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    assert 'uploaded to https://huggingface.co/me/x' in inside(*command).stdout
    assert calls[0]['private']
    assert str(calls[1]['folder_path']) == students['lora']

# --------------------------------------------------------------------------------------------------
# the published models' own sizes, on the meta device

def test_the_plan_has_the_right_sizes():
    """The parameters and GB that the scripts' plan computes with, counted anew; and what the README
    promises of it, whole networks on 8 cards of 40 GB, adapters on one of 24."""
    for name, used, counted in bench.sizes(bench.UPDATES[:2]):
        assert used == pytest.approx(counted, rel=.03), name

    def total(world=1, **flags):
        need = m.gigabytes(bench.settings('sdxl', **flags), world, world, True)
        return need['frozen'] + need['trained'] + need['activations']

    assert total(8) < 30
    assert total(8, micro=2) < 45
    assert total(2) < 64
    assert total(lora=64, gan_crop=512) < 18
    assert total(cpu_offload=True, gan_crop=512) < 16
    # two machines repeat the shares of one
    two = m.gigabytes(bench.settings('sdxl'), 16, 8, True)
    assert two == m.gigabytes(bench.settings('sdxl'), 8, 8, True)

SIZES = {                                # parameters, network's configuration, features' channels
    'SDXL': (2_567_463_684, UNET, [320, 640, 1280, 1280]),
    'SD3-Medium': (2_028_328_000, MMDIT, [1536] * 12),
    'SD3.5-Medium': (2_243_171_520, MMDIT | dict(
        dual_attention_layers=tuple(range(13)), qk_norm='rms_norm', pos_embed_max_size=384),
        [1536] * 12),
    'SD3.5-Large': (8_056_627_520, MMDIT | dict(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm='rms_norm'),
        [2432] * 19),
    'Qwen-Image, 4 of its 60 blocks': (
        20_430_401_088 - 56 * 339_831_296, dict(num_layers=4), [3072] * 2),
    'Z-Image, 4 of its 30 blocks': (
        6_154_908_736 - 26 * 180_910_336, dict(n_layers=4), [3840] * 2)}

def reward_of_that_size(base, net):
    """LatentReward around a network of that size, with text encoders in name only."""
    base.pipe = SimpleNamespace(components={})
    text = nn.Module()
    text.config = SimpleNamespace(projection_dim=1280)
    return m.LatentReward(base, net, text, text).to('meta')

@pytest.mark.parametrize('name', SIZES)
def test_the_passes_of_an_iteration_at_full_size(name):
    """At 1024 px, without memory: shapes, dtypes, and all that is trained gets a gradient; of SDXL
    all weights, of SD3 adapters of rank 64."""
    count, config, channels = SIZES[name]
    sdxl, qwen, zimage = name == 'SDXL', 'Qwen' in name, 'Z-Image' in name
    kind, network, c, tokens, width, pooled = m.SD3, SD3Transformer2DModel, 16, 333, 4096, 2048
    if sdxl:
        kind, network, c, tokens, width, pooled = m.SDXL, UNet2DConditionModel, 4, 77, 2048, 1280
    if qwen:                                                       # the last is its mask's
        kind, network = m.QwenImage, QwenImageTransformer2DModel
        tokens, width, pooled = 64, 3584, 64
    if zimage:
        kind, network, tokens, width = m.ZImage, ZImageTransformer2DModel, 77, 2560
    base = bare(kind, m.Schedule(DDPMScheduler() if sdxl else FlowMatchEulerDiscreteScheduler(
        shift=3.)), 1024, 'meta', tokens, width, pooled)
    with torch.device('meta'):
        net = base.teacher = network(**config)
        base.vae = AutoencoderKL(**VAE_OF['sdxl' if sdxl else 'sd3']).requires_grad_(False)
        if qwen:
            base.vae = AutoencoderKLQwenImage().requires_grad_(False)
        assert sum(w.numel() for w in net.parameters()) == count
        if not sdxl:
            net.requires_grad_(False)
            net = base.trainable(m.lora_config(net, 64, 128., 'attention'))
            assert all('lora' in k for k in m.trained(net))
    base.latent_shape = c, 128, 128
    if zimage:
        base.uncond[1] = torch.tensor([[tokens]])                       # a length, which is read
    y = base.uncond
    steps = base.schedule.steps(4).to('meta')
    noise = torch.empty(1, 4, c, 128, 128, device='meta')
    x_s, t_s = m.reach(base, net, steps, noise, y, 1)
    x0 = base.x0(net, x_s, t_s, y)
    assert (x0.shape, x0.dtype) == ((1, c, 128, 128), torch.float32)
    x0.mean().backward()
    assert all(w.grad.shape == w.shape for w in m.trained(net).values())
    z = x0.detach().requires_grad_()
    pixels = base.decode(z)
    assert pixels.shape == (1, 3, 1024, 1024)
    pixels.mean().backward()
    assert z.grad.shape == z.shape
    assert base.latents(pixels).shape == z.shape
    with torch.no_grad():
        assert base.x0(base.teacher, z, t_s, y, 8.).shape == z.shape
        maps = base.features(net, z, t_s, y)
        if not (qwen or zimage):
            reward = reward_of_that_size(base, net)
            assert reward.visual_projection.weight.shape == (1280, sum(channels))
            assert reward(z, t_s, [torch.cat([v, v]) for v in y]).shape == (1,)
    assert base.channels(net) == [f.shape[1] for f in maps] == channels
    sides = [128, 64, 32, 32] if sdxl else [64] * len(channels)
    assert [f.shape[-1] for f in maps] == sides
    head = m.Head(channels[-1]).to('meta')
    assert head(maps[-1]).shape == (1, 1)

# --------------------------------------------------------------------------------------------------
# the scripts: an SD3 recipe, and SDXL with adapters

SHORT = ['--batch', 4, '--micro', 4, '--save_every', 2, '--sample_every', 0, '--log_every', 1,
         '--workers', 0, '--warmup', 0, '--cooldown', 0]
STAGE_1 = {
    'sd3': ['train_stage1.py', '--recipe', 'toy-sd3', *SHORT, '--iters', 4],
    'lora': ['train_stage1.py', '--recipe', 'toy', '--lora', 8, *SHORT, '--iters', 4]}

def run(out, *command):
    """Runs a script here; returns what it printed."""
    done = inside(*command, '--out', out)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

@pytest.fixture(scope='session', params=STAGE_1)
def trained(request, tmp_path_factory):
    """Four iterations of stage 1 with adapters: the family's name, the run's folder, and what it
    printed."""
    out = tmp_path_factory.mktemp(request.param) / 'run'
    return request.param, out, run(out, *STAGE_1[request.param])

def test_adapters_alone_are_trained_and_saved(trained):
    name, out, said = trained
    steps = dict(sd3='[1000, 900, 750, 500]', lora='[999, 749, 499, 249]')
    assert f'steps {steps[name]}' in said
    state = weights(out, 4)
    assert {k.split('.')[0] for k in state} == {'student', 'fake', 'heads'}
    assert all('lora' in k for k in state if not k.startswith('heads'))
    assert sum(f.stat().st_size for f in (out / 'student').rglob('*')) < 2e6

def test_adapters_resume_bit_for_bit(trained, tmp_path):
    name, out, _ = trained
    again = tmp_path / 'again'
    shutil.copytree(out, again, ignore=shutil.ignore_patterns('state-0000004'))
    assert 'of iteration 2' in run(again, *STAGE_1[name])
    assert equal(weights(out, 4), weights(again, 4))

def test_two_ranks_are_one_with_adapters(tmp_path):
    """A flow, adapters, and Z-Image's lists of texts; SDXL's are in stage 2's test of ranks."""
    one, two = tmp_path / 'one', tmp_path / 'two'
    command = [*STAGE_1['sd3'][:-1], 2, '--save_every', 1, '--model', family('zimage').name,
               '--lora', 4]
    run(one, *command)
    done = start(*command, '--micro', 1, '--out', two, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not far_from_one_step(weights(two, 2), weights(one, 2), weights(one, 1))

def test_sampling_and_merging(trained, tmp_path):
    """sample.py on a LoRA student and on the pipeline it merges to draw the same picture, its
    teacher another; evaluate.py takes it as well."""
    _, out, _ = trained
    merged = tmp_path / 'merged'
    assert inside('sample.py', '--ckpt', out, '--merge', merged).returncode == 0
    drawn = {}
    for name, flags in dict(student=[out], merged=[merged], teacher=[out, '--teacher']).items():
        file = tmp_path / f'{name}.png'
        run(file, 'sample.py', '--n', 1, '--prompt', PROMPTS[0], '--ckpt', *flags)
        drawn[name] = np.asarray(Image.open(file), np.float32)
    assert np.abs(drawn['student'] - drawn['merged']).max() <= 1
    assert np.abs(drawn['student'] - drawn['teacher']).mean() > 1
    said = run(tmp_path / 'a.json', 'evaluate.py', '--ckpt', out, '--teacher', '--teacher_steps', 2,
               '--n', 4, '--n_real', 8)
    assert said.count('| ') > 10

def test_stage_2_on_adapters(trained, tmp_path):
    """It goes on from a LoRA run, and from its student alone, where the first ratio is exactly
    1."""
    _, out, _ = trained
    short = [*SHORT, '--iters', 2, '--eval_every', 0]
    said = run(tmp_path / 'a', 'train_stage2.py', '--init', out, *short)
    assert 'moments of its state: fake, heads, student; new: none' in said
    distilled, preferred = rows(tmp_path / 'a')
    assert 'fake' in distilled
    assert preferred['rl/gap'] > 0
    shutil.copytree(out / 'student', tmp_path / 'alone')
    run(tmp_path / 'b', 'train_stage2.py', '--init', tmp_path / 'alone', *short, '--no-joint',
        '--gan', 'none', '--reward', 'pickscore')
    first, second = rows(tmp_path / 'b')
    assert first['rl/ratio'] == 1
    assert second['rl/ratio'] != 1
    run(tmp_path / 'x.png', 'sample.py', '--ckpt', tmp_path / 'b', '--n', 1)

# --------------------------------------------------------------------------------------------------
# what adapters and families refuse

@pytest.fixture(scope='session')
def broken(tmp_path_factory):
    """A folder of things to point flags at: students of the toy SD3 that are none, a merged
    pipeline's place that is taken, a pipeline of another family."""
    folder = tmp_path_factory.mktemp('broken')
    base = family('sd3')
    lora = m.lora_config(base.teacher, 4, 8., 'attention')
    exported(base, folder / 'sound', lora, adapted(base))
    sound = folder / 'sound/student'
    facts = json.loads((sound / 'student.json').read_text()) | dict(recipe='toy-sd3')
    (sound / 'student.json').write_text(json.dumps(facts))
    for name in ('short', 'other', 'odd', 'wide'):
        shutil.copytree(sound, folder / name)
    file = folder / 'short/pytorch_lora_weights.safetensors'
    file.write_bytes(file.read_bytes()[:500])
    other = facts | dict(base_model='assets/toy/sdxl')
    (folder / 'other/student.json').write_text(json.dumps(other))
    odd = facts | dict(lora=dict(rank='four'))
    (folder / 'odd/student.json').write_text(json.dumps(odd))
    file = folder / 'wide/pytorch_lora_weights.safetensors'
    tensors = load_file(file)
    for k, v in tensors.items():
        tensors[k] = torch.cat([v, v], 1) if 'lora_A' in k else v
    save_file(tensors, file)
    pipe = m.load_pipeline(ROOT / 'assets/toy/sdxl', '', torch.float32)
    names = 'vae', 'text_encoder', 'tokenizer', 'unet', 'scheduler'
    parts = {k: pipe.components[k] for k in names}
    diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None).save_pretrained(folder / 'sd1')
    return folder

ONE, TWO = ['train_stage1.py', '--iters', 1], ['train_stage2.py', '--iters', 1, '--eval_every', 0]
REFUSED = [                                                   # command, what the sentence says
    ([*ONE, '--lora', 1000], '--lora 1000 is more than down_blocks.0'),
    ([*ONE, '--fake_lora', 900, '--couple', 1], '--fake_lora 900 is more than down_blocks.0'),
    ([*ONE, '--lora', 4, '--lora_targets', 'nothing'], '--lora_targets nothing: the network has'),
    ([*ONE, '--lora', 4, '--lora_targets', 'norm1'], 'norm1 is no linear layer or convolution'),
    ([*ONE, '--recipe', 'toy-sd3', '--t5'], '--t5: --model assets/toy/sd3 has no T5'),
    ([*ONE, '--model', 'TMP/sd1'],
     'StableDiffusion3Pipeline, QwenImagePipeline, ZImagePipeline. Another is a subclass of Base'),
    ([*TWO, '--init', 'assets/toy/student', '--lora', 4], 'is one of --lora 32 and stays one'),
    ([*TWO, '--init', 'TMP/wide'], 'is of another base model'),
    ([*TWO, '--init', 'TMP/sound', '--lora_targets', 'to_q'], 'or no student of this --model and'),
    ([*TWO, '--init', 'TMP/sound', '--reward', 'pickscore', '--pickscore', 'TMP/nowhere'],
     '--reward pickscore: TMP/nowhere could not be found'),
    ([*TWO, '--init', 'TMP/sound', '--reward', 'latent', '--lrm', 'assets/toy/lrm'],
     'a folder with transformer/, text_encoder/'),
    (['sample.py', '--ckpt', 'TMP/short'], 'is missing, truncated or not a LoRA file'),
    (['sample.py', '--ckpt', 'TMP/other'], 'is of another base model'),
    (['sample.py', '--ckpt', 'TMP/odd'], 'its student.json cannot be read'),
    (['sample.py', '--ckpt', 'TMP/sound', '--merge', 'TMP/short'], '--merge TMP/short exists')]

@pytest.mark.parametrize('command, says', REFUSED, ids=[says for _, says in REFUSED])
def test_bad_input_is_one_sentence(command, says, broken, tmp_path):
    before = listing(broken)
    where = tmp_path / 'out'
    done = refused(*[str(x).replace('TMP', str(broken)) for x in command], '--out', where)
    said = [x for x in done.stderr.splitlines() if x and not x.startswith('usage:')]
    assert done.returncode == 2, done.stderr
    assert len(said) == 1
    assert 'error: ' in said[0]
    assert says.replace('TMP', str(broken)) in said[0]
    assert listing(broken) == before
    assert listing(tmp_path).keys() <= {'out/.lock'}
