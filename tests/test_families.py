"""
SD3 beside SDXL, and LoRA for both.    pytest tests/test_families.py
"""

import argparse
import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model as m
from conftest import ROOT, start
from test_math import latent_reward_of
from test_scripts import largest_difference, listing, weights

PROMPTS = ['a red circle on blue', 'a striped white star above a green ring on black']
FAMILIES = {'sdxl': ROOT / 'assets/toy/sdxl', 'sd3': ROOT / 'assets/toy/sd3'}


@pytest.fixture(scope='session')
def toy3():
    """model.Base of the toy SD3."""
    return m.Base(FAMILIES['sd3'])


@pytest.fixture(params=FAMILIES)
def base(request, toy, toy3):
    return dict(sdxl=toy, sd3=toy3)[request.param]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------- SD3

def test_flow_times_go_through_the_shift(toy3):
    """Uniform u -> 3 u / (1 + 2 u) for the DM loss; the median of the fake score's logit-normal times is u = 1/2, t = 750."""
    schedule, u = toy3.schedule, (torch.arange(20_000).double() + .5) / 20_000
    assert schedule.steps(4).tolist() == [1000, 900, 750, 500]
    for low, high in [(0, 1000), (20, 980)]:
        v = (low + (high - low) * u) / 1000
        assert torch.allclose(schedule.between(u, low, high), 1000 * 3 * v / (1 + 2 * v))
    t = schedule.training(u) / 1000
    back = torch.logit(t / (3 - 2 * t))                                      # unshifted, its logit is a standard normal
    assert abs(back.mean()) < 1e-3 and abs(back.std() - 1) < 1e-2 and abs(t.median() - .75) < 1e-3
    assert torch.isfinite(schedule.training(torch.zeros(1))).all()


def test_sd3_conditioning_is_diffusers(toy3):
    """base.predict is the pipeline's own call of its transformer, under guidance with the encoded empty prompt."""
    caught = []
    hook = toy3.teacher.register_forward_hook(lambda net, args, kwargs, out: caught.append((kwargs, out[0])), with_kwargs=True)
    toy3.pipe(PROMPTS, latents=normal(2, *toy3.latent_shape), num_inference_steps=2, guidance_scale=5., output_type='latent',
              **m.text_length(toy3.pipe))
    hook.remove()
    kwargs, out = caught[0]
    y = toy3.encode(PROMPTS)
    for name, u, c in zip(['encoder_hidden_states', 'pooled_projections'], toy3.uncond, y):
        assert torch.allclose(kwargs[name], torch.cat([u.expand_as(c), c]), atol=1e-5) and u.abs().sum() > 0
    x, t = kwargs['hidden_states'], kwargs['timestep']
    with torch.no_grad():
        assert torch.allclose(toy3.predict(toy3.teacher, x[2:], t[2:], y), out[2:], atol=1e-4)
        ours = toy3.x0(toy3.teacher, x[:2], t[:2], y, 5.)
    u, c = out.chunk(2)
    assert torch.allclose(ours, x[:2] - (t[0] / 1000) * (u + 5 * (c - u)), atol=1e-3)


def test_shift_factor_is_undone():
    """decode(latents(pixels)) is the VAE's own reconstruction where the latents are shifted and scaled."""
    base = m.Base(FAMILIES['sd3'])
    assert base.vae.config.shift_factor
    x = normal(2, 3, 64, 64).clamp(-1, 1)
    with torch.no_grad():
        z = base.vae.encode(x).latent_dist.mean
        assert torch.allclose(base.latents(x), (z - base.vae.config.shift_factor) * base.vae.config.scaling_factor, atol=1e-5)
        assert torch.allclose(base.decode(base.latents(x)), base.vae.decode(z).sample, atol=1e-4)


def with_t5(folder):
    """The toy SD3 with a T5 of random weights and a tokenizer of letters."""
    from tokenizers import Tokenizer, models
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast
    pipe = m.load_pipeline(FAMILIES['sd3'], '', torch.float32)
    letters = ['<pad>', '</s>', '<unk>', *'abcdefghijklmnopqrstuvwxyz']
    tokenizer = T5TokenizerFast(tokenizer_object=Tokenizer(models.Unigram([(x, 0.) for x in letters], unk_id=2)), extra_ids=0)
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(vocab_size=len(letters), d_model=160, d_kv=32, d_ff=64, num_layers=1, num_heads=2))
    type(pipe)(**dict(pipe.components, text_encoder_3=t5, tokenizer_3=tokenizer)).save_pretrained(folder)
    return folder


def test_a_transformers_latent_reward_is_lpos_formula(toy3):
    """Against a forward pass written out from the transformer's own first blocks, with the guidance on the last one alone."""
    torch.manual_seed(0)
    reward = m.LatentReward(toy3, toy3.trainable().eval(), toy3.pipe.text_encoder, toy3.pipe.text_encoder_2)
    net, z, t = reward.net, torch.randn(3, *toy3.latent_shape), torch.tensor([900., 750., 500.])
    prompts = ['a red circle on blue', 'a white ring on black', 'a star']
    y, whole = reward.encode(prompts), toy3.encode(prompts)
    assert len(net.transformer_blocks) == 3 and torch.equal(y[0][:3], whole[0])
    with torch.no_grad():
        found = []
        for e, pooled in [[v[:3] for v in y], [v[3:] for v in y]]:
            h, e, emb = net.pos_embed(z), net.context_embedder(e), net.time_text_embed(t, pooled)
            for block in net.transformer_blocks:
                e, h = block(hidden_states=h, encoder_hidden_states=e, temb=emb)
                found.append(h.mean(1))
        first, second, cond, *_, uncond = found
        v = torch.cat([first, second, uncond + 7.5 * (cond - uncond)], 1) @ reward.visual_projection.weight.T
        expected = reward.logit_scale.exp() * F.cosine_similarity(v, toy3.pipe.text_encoder_2(
            toy3.pipe.tokenizer_2(prompts, padding='max_length', return_tensors='pt').input_ids).text_embeds)
        assert torch.allclose(reward(z, t, y), expected, rtol=1e-4, atol=1e-4)


def test_t5_can_be_left_away(tmp_path, capsys):
    """With its T5 the context is CLIP's tokens and 256 more; without, CLIP's and as many zeros; --offload changes nothing."""
    folder = with_t5(tmp_path / 'sd3')
    whole, without, moved = (m.Base(folder, t5=t5, offload=o) for t5, o in [(None, False), (False, False), (True, True)])
    clip = whole.pipe.tokenizer_max_length
    assert whole.encode(PROMPTS)[0].shape == (2, clip + 256, 160) and len(whole.encoders) == 3
    y = without.encode(PROMPTS)[0]
    assert y.shape == (2, 2 * clip, 160) and (y[:, clip:] == 0).all() and len(without.encoders) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.encode(PROMPTS), moved.encode(PROMPTS)))
    with pytest.raises(SystemExit):
        m.Base(FAMILIES['sd3'], t5=True)
    assert 'has no T5' in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- both families' sampling

def test_three_samplers_agree(base, tmp_path, monkeypatch):
    """backward_simulation, diffusers' pipeline with the exported scheduler, and the closed form alpha x0 + sigma noise."""
    steps, noise = base.schedule.steps(4), normal(2, 4, *base.latent_shape)
    m.save_student(tmp_path / 'student', base, base.teacher, steps, torch.float32, dict(base_model='x'))
    pipe = m.load_student(tmp_path / 'student', json.loads((tmp_path / 'student/student.json').read_text()), torch.float32)
    y = base.encode(PROMPTS)
    with torch.no_grad():
        ours = base.decode(m.backward_simulation(base, base.teacher, steps, noise, y))
        x = noise[:, 0]
        for k, t in enumerate(steps):
            a, s = base.schedule.alpha(t[None]), base.schedule.sigma(t[None])
            out = base.predict(base.teacher, x, t.expand(2), y)
            x0 = (x - s * out) / a if base.schedule.kind == 'epsilon' else x - s * out
            x = x0 if k == 3 else base.schedule.alpha(steps[k + 1:k + 2]) * x0 + base.schedule.sigma(steps[k + 1:k + 2]) * noise[:, k + 1]
        assert torch.allclose(base.decode(x), ours, atol=1e-4)
    import diffusers.schedulers.scheduling_flow_match_euler_discrete as flow
    import diffusers.schedulers.scheduling_lcm as lcm
    fresh = iter([*noise[:, 1:].unbind(1), noise[:, 0]])                            # Euler draws noise at its last step as well
    for module in (flow, lcm):
        monkeypatch.setattr(module, 'randn_tensor', lambda *a, **k: next(fresh))
    how = dict(num_inference_steps=4) if base.part == 'unet' else dict(sigmas=[1, .75, .5, .25])
    theirs = pipe(PROMPTS, latents=noise[:, 0], guidance_scale=0., output_type='pt', **how, **m.text_length(pipe)).images
    assert torch.allclose(pipe.scheduler.timesteps.float(), steps, atol=1e-3)
    assert torch.allclose(theirs, (ours / 2 + .5).clamp(0, 1), atol=2e-3)


def test_a_pictures_noise_depends_on_its_index_alone(base, tmp_path):
    """SD3's pipeline gives its stochastic scheduler no generator; generate() does."""
    m.save_student(tmp_path / 'student', base, base.teacher, base.schedule.steps(4), torch.float32, {})
    pipe = m.load_student(tmp_path / 'student', {}, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    both = m.generate(pipe, PROMPTS, [3, 8], 0, 4, 0.)
    assert torch.allclose(m.generate(pipe, PROMPTS[1:], [8], 0, 4, 0.), both[1:], atol=1e-3)
    assert (m.generate(pipe, PROMPTS[1:], [9], 0, 4, 0.) - both[1:]).abs().mean() > .01


# --------------------------------------------------------------------------------------------------------------- LoRA

def adapted(base, rank=4, seed=0, **kwargs):
    """A network with the base's tensors and adapters that are not zero."""
    torch.manual_seed(seed)
    net = base.trainable(m.lora_config(base.teacher, rank, 2 * rank, kwargs.get('targets', 'attention')))
    for w in m.trained(net).values():
        nn.init.normal_(w, std=.1)
    return net


def test_adapters_do_not_leak(base):
    """Student and fake score hold the teacher's own tensors; training either changes nothing in the other two."""
    student, fake = adapted(base), adapted(base, seed=1)
    own = {w.data_ptr() for w in base.teacher.parameters()}
    for net in (student, fake):
        frozen = [w for w in net.parameters() if not w.requires_grad]
        assert {w.data_ptr() for w in frozen} == own and m.trained(net)
        assert all('lora' in k and w.dtype == torch.float32 for k, w in m.trained(net).items())
    x, t, y = normal(2, *base.latent_shape), base.schedule.steps(4)[1].expand(2), base.encode(PROMPTS)
    out = lambda net: base.predict(net, x, t, y)
    with torch.no_grad():
        teacher, other, mine = out(base.teacher), out(fake), out(student)
    assert (teacher - other).abs().max() > 1e-3 and (mine - other).abs().max() > 1e-3
    opt = torch.optim.AdamW(m.trained(student).values(), lr=.01)
    out(student).square().mean().backward()
    assert all(w.grad is None for w in [*base.teacher.parameters(), *fake.parameters()])
    assert m.update(opt, student) > 0
    with torch.no_grad():
        assert torch.equal(out(base.teacher), teacher) and torch.equal(out(fake), other) and not torch.equal(out(student), mine)
    m.couple(fake, student, .5)                                         # eq. 11 on the adapters, and on nothing else
    assert torch.equal(out(base.teacher), teacher) and not torch.equal(out(fake), other)
    reference = m.twin(student).requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(out(reference), out(student))
    assert not {w.data_ptr() for w in m.trained(student).values()} & {w.data_ptr() for w in reference.parameters()}


@pytest.mark.parametrize('gan', ['pixel', 'latent'])
def test_an_iteration_is_algorithm_1(base, gan):
    """The gradients that one iteration leaves on student, fake score and heads, three networks that differ, beside those of the
    losses written out in one piece; and DMD2's, without the split. Random numbers are taken from the part in its order."""
    p = argparse.ArgumentParser()
    m.training_flags(p, '')
    args = p.parse_args(f'--gan {gan} --gan_weight .3 --cfg 3 --batch 2 --micro 2 --student_lr 0 --fake_lr 0 --heads_lr 0 --sam '
                        f'{ROOT / "assets/toy/sam.pth"} {"--split" if gan == "pixel" else "--no-split"}'.split())
    notes, share, it = {}, .25, 3
    d = m.Distillation(base, SimpleNamespace(args=args, world=1, cuda=False, mine=range(2), note=notes.__setitem__))
    torch.manual_seed(0)
    with torch.no_grad():
        for net in (d.student, d.fake):
            for w in net.parameters():
                w += .05 * w.std(correction=0) * torch.randn_like(w)
    d.distribute()
    part, = d.parts(it, PROMPTS, normal(2, 3, base.size, base.size).clamp(-1, 1))
    d.student_backward(part, it, True, share)
    assert all(w.grad is None for net in (d.fake, d.heads, base.teacher, base.vae) for w in net.parameters())
    grads = {'student': [w.grad for w in d.student.parameters()]}
    d.critic_backward(part, it, share)
    assert all(w.grad is g for w, g in zip(d.student.parameters(), grads['student']))
    grads |= {name: [w.grad for w in net.parameters() if w.requires_grad] for name, net in d.nets.items() if name != 'student'}

    flow, eps, y, at = base.schedule.kind == 'flow', part.eps, part.y, base.schedule.steps(4)
    noised, clean = base.schedule.noised, base.schedule.x0
    mse = lambda a, b: (a - b).square().mean()
    G = lambda x, t: clean(base.predict(d.student, x, t, y), x, t)

    def times(u, low, high):
        v = (low + (high - low) * u) / 1000
        return 3000 * v / (1 + 2 * v) if flow else (low + (high + 1 - low) * u).floor()
    s, = [k for k in range(4) if f'dm/{int(at[k])}' in notes]
    t = at.expand(2, 4).unbind(1)
    with torch.no_grad():
        x = eps[:, 0]
        for k in range(s):
            x = noised(G(x, t[k]), eps[:, k + 1], t[k + 1])
    x0 = z = G(x, t[s])
    with torch.no_grad():
        tau = times(part.u[:, 0], 20, 980)
        x = noised(x0, eps[:, 4], tau)
        cond, uncond = base.predict(base.teacher, x, tau, y), base.predict(base.teacher, x, tau, [a.expand_as(b) for a, b in zip(
            base.uncond, y)])
        real, fake = clean(uncond + 3 * (cond - uncond), x, tau), clean(base.predict(d.fake, x, tau, y), x, tau)
        push = (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)
    if gan == 'pixel':
        with torch.no_grad():
            x = x0
            for k in range(s + 1, 4):
                x = G(noised(x, eps[:, k], t[k]), t[k])
        z = G(noised(x, eps[:, 5], t[3]), t[3])                                           # one step of four is at low noise
    see = lambda x, e, t: d.heads(x if gan == 'pixel' else m.bottleneck(base, d.fake, noised(x, e, t), t, y))
    made = base.decode(z) if gan == 'pixel' else z
    logits = see(made, eps[:, 6], times(part.u[:, 1], 0, 999))
    adv = -logits.mean() if gan == 'pixel' else -F.logsigmoid(logits).mean()
    loss = {'student': (push * x0).mean() + .3 * adv}

    pixels = part.pixels if gan == 'pixel' else base.latents(part.pixels)
    t_d, t_f = times(part.u[:, 3], 0, 999), base.schedule.training(part.u[:, 2])
    real, fake = see(pixels, eps[:, 8], t_d), see(made.detach(), eps[:, 6], t_d)
    hinge = ((1 - real).clamp(min=0) + (1 + fake).clamp(min=0)).mean()
    clean0 = x0.detach()
    loss['fake'] = mse(base.predict(d.fake, noised(clean0, eps[:, 7], t_f), t_f, y), eps[:, 7] - clean0 if flow else eps[:, 7])
    if gan == 'pixel':
        loss['heads'] = hinge
    else:                                                                   # the fake score is the critic, with a small weight
        loss['fake'] = loss['heads'] = loss['fake'] - .01 * (F.logsigmoid(real) + F.logsigmoid(-fake)).mean()
    for name, value in loss.items():
        own = torch.autograd.grad(value, [w for w in d.nets[name].parameters() if w.requires_grad], retain_graph=True,
                                  allow_unused=True)
        a, b = (torch.cat([g.flatten() for g in gs if g is not None]) for gs in (grads[name], own))
        assert [g is None for g in grads[name]] == [g is None for g in own]
        assert a.norm() > 1e-4 and (a - share * b).norm() < 1e-3 * a.norm(), name


def test_checkpointing_gives_the_same_gradients(base):
    nets = adapted(base), adapted(base)
    nets[1].enable_gradient_checkpointing()
    x, t, y = normal(2, *base.latent_shape), base.schedule.steps(4)[2].expand(2), base.encode(PROMPTS)
    for net in nets:
        base.predict(net, x, t, y).square().mean().backward()
    for (k, a), b in zip(m.trained(nets[0]).items(), m.trained(nets[1]).values()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-7)
        assert a.grad.abs().sum() > 0 or 'add_q_proj' in k                  # SD3's last block throws the text's answer away


def test_an_adapter_of_full_rank_is_full_fine_tuning():
    """W + B A with A = 1 and B trained, against W trained: the same weights after five AdamW steps of an eps loss."""
    from peft import LoraConfig, inject_adapter_in_model

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
    opts = [torch.optim.AdamW(m.trained(net).values(), lr=.05, weight_decay=0.) for net in (full, other)]
    for k in range(5):
        x, eps = normal(32, 6, seed=k), normal(32, 6, seed=10 + k)
        for net, opt in zip((full, other), opts):
            F.mse_loss(net(x), eps).backward()
            m.update(opt, net)
    merged = layer.base_layer.weight + layer.lora_B.default.weight @ layer.lora_A.default.weight
    assert torch.allclose(merged, full.to_q.weight, atol=1e-5)
    assert (merged - layer.base_layer.weight).abs().max() > .1


@pytest.mark.parametrize('alpha', [8., 2.])
def test_a_saved_lora_is_the_student_at_scale_one(base, tmp_path, alpha):
    """load_lora_weights on the plain base pipeline, whatever alpha was trained with, and back into a network to train on."""
    from diffusers import DiffusionPipeline
    lora = m.lora_config(base.teacher, 4, alpha, 'attention')
    torch.manual_seed(0)
    student = base.trainable(lora)
    for w in m.trained(student).values():
        nn.init.normal_(w, std=.1)
    m.save_student(tmp_path / 'student', base, student, base.schedule.steps(4), torch.float32, dict(base_model=base.name), lora)
    plain = DiffusionPipeline.from_pretrained(base.name, **{} if base.part == 'unet' else dict(text_encoder_3=None, tokenizer_3=None))
    plain.load_lora_weights(tmp_path / 'student')
    x, t, y = normal(2, *base.latent_shape), base.schedule.steps(4)[1].expand(2), base.encode(PROMPTS)
    with torch.no_grad():
        ours, theirs = base.predict(student, x, t, y), base.predict(getattr(plain, base.part), x, t, y)
        assert torch.allclose(ours, theirs, atol=1e-4) and (ours - base.predict(base.teacher, x, t, y)).abs().max() > 1e-2
        again = base.trainable(lora)
        m.restore_student(again, tmp_path / 'student', lora)
        assert torch.allclose(base.predict(again, x, t, y), ours, atol=1e-5)
    facts = json.loads((tmp_path / 'student/student.json').read_text())
    assert facts['lora']['rank'] == 4 and facts['lora']['alpha'] == alpha
    pipe = m.load_student(tmp_path / 'student', facts, torch.float32)
    kept = json.loads((tmp_path / 'student/scheduler/scheduler_config.json').read_text())
    assert kept['_class_name'] == type(pipe.scheduler).__name__ == dict(unet='LCMScheduler', transformer='FlowMatchEulerDiscreteScheduler')[base.part]
    assert kept.get('original_inference_steps') == 4 or kept.get('stochastic_sampling')


def test_half_precision_base_under_full_precision_adapters(base):
    """The base in bf16 as on CUDA: adapters stay fp32, get gradients, and begin as the teacher."""
    half = m.Base(base.name, dtype=torch.bfloat16)
    net = half.trainable(m.lora_config(half.teacher, 4, 8., 'attention'))
    x, t, y = normal(2, *half.latent_shape), half.schedule.steps(4)[1].expand(2), half.encode(PROMPTS)
    half.autocast = lambda: torch.autocast('cpu', torch.bfloat16)
    out = half.predict(net, x, t, y)
    with torch.no_grad():
        assert torch.allclose(out, half.predict(half.teacher, x, t, y), atol=1e-6)
    out.square().mean().backward()
    assert all(w.dtype == w.grad.dtype == torch.float32 for w in m.trained(net).values())
    assert {w.dtype for w in net.parameters() if not w.requires_grad} == {torch.bfloat16}


def test_a_reference_in_half_precision_is_the_student(base):
    """Bit for bit, under the autocast that CUDA has: so the first ratios of stage 2 are 1 at half the memory."""
    half = m.Base(base.name, dtype=torch.bfloat16)
    half.autocast = lambda: torch.autocast('cpu', torch.bfloat16)
    x, t, y = normal(2, *half.latent_shape), half.schedule.steps(4)[1].expand(2), half.encode(PROMPTS)
    for net in (half.trainable(), half.trainable(m.lora_config(half.teacher, 4, 8., 'attention'))):
        torch.manual_seed(0)
        for w in m.trained(net).values():
            w.data += .05 * torch.randn_like(w)
        before, reference = {k: w.clone() for k, w in m.trained(net).items()}, m.twin(net, torch.bfloat16).requires_grad_(False)
        with torch.no_grad():
            assert torch.equal(half.predict(reference, x, t, y), half.predict(net, x, t, y))
        assert all(w.dtype == torch.float32 and torch.equal(w, before[k]) for k, w in m.trained(net).items())
        assert torch.bfloat16 in {dict(reference.named_parameters())[k].dtype for k in before}


def test_v_prediction_is_distilled_as_well(tmp_path):
    """An SDXL pipeline whose scheduler says v_prediction: x0 and target are v's, and the exported scheduler says so too."""
    folder = tmp_path / 'v'
    shutil.copytree(FAMILIES['sdxl'], folder)
    file = folder / 'scheduler/scheduler_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(prediction_type='v_prediction')))
    base = m.Base(folder)
    assert base.schedule.kind == 'v_prediction'
    m.save_student(tmp_path / 'student', base, base.teacher, base.schedule.steps(4), torch.float32, {})
    assert m.load_student(tmp_path / 'student', {}, torch.float32).scheduler.config.prediction_type == 'v_prediction'


# ------------------------------------------------------------------------------------------------------- SD3's real sizes

SIZES = {'SD3-Medium': (2_028_328_000, dict()),
         'SD3.5-Medium': (2_243_171_520, dict(dual_attention_layers=tuple(range(13)), qk_norm='rms_norm', pos_embed_max_size=384)),
         'SD3.5-Large': (8_056_627_520, dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm='rms_norm'))}


@pytest.mark.parametrize('name', SIZES)
def test_one_iteration_at_sd3_sizes_on_meta(name):
    """Every pass of a stage-1 iteration at 1024 px with LoRA, rank 64, without memory: shapes, dtypes, trained parameters."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    count, config = SIZES[name]
    medium = dict(sample_size=128, num_layers=24, num_attention_heads=24, attention_head_dim=64, joint_attention_dim=4096,
                  caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192)
    with torch.device('meta'):
        teacher = SD3Transformer2DModel(**medium | config).requires_grad_(False)
        vae = AutoencoderKL(sample_size=1024, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
                            down_block_types=['DownEncoderBlock2D'] * 4, up_block_types=['UpDecoderBlock2D'] * 4,
                            scaling_factor=1.5305, shift_factor=.0609, use_quant_conv=False, use_post_quant_conv=False)
    assert sum(w.numel() for w in teacher.parameters()) == count
    base = m.Base.__new__(m.Base)
    base.teacher, base.vae, base.part, base.size = teacher, vae.requires_grad_(False), 'transformer', 1024
    base.device, base.schedule = torch.device('meta'), m.Schedule(FlowMatchEulerDiscreteScheduler(shift=3.))
    base.autocast = lambda: torch.autocast('cpu', enabled=False)
    base.uncond = torch.zeros(1, 333, 4096, device='meta'), torch.zeros(1, 2048, device='meta')
    y = [torch.zeros(1, 333, 4096, device='meta'), torch.zeros(1, 2048, device='meta')]
    lora = m.lora_config(teacher, 64, 128., 'attention')
    with torch.device('meta'):
        student, fake = base.trainable(lora), base.trainable(lora)
    steps, noise = base.schedule.steps(4).to('meta'), torch.empty(1, 9, 16, 128, 128, device='meta')
    with torch.no_grad():
        before = m.backward_simulation(base, student, steps, noise, y, stop=2)
    x0 = base.x0(student, *m.at_step(base, steps, noise, 2, before), y)
    assert x0.shape == (1, 16, 128, 128) and x0.dtype == torch.float32 and x0.requires_grad
    with torch.no_grad():
        r = base.x0(teacher, x0, steps[1:2], y, 7.)
    _, push = m.slope(lambda x: m.dm_loss(x, r, r), x0)
    _, pull = m.slope(lambda x: base.decode(x).mean(), x0)
    torch.autograd.backward([x0, x0], [push, pull])
    m.diffusion_loss(base, fake, x0.detach(), noise[:, 4], steps[:1], y).backward()
    for net in (student, fake):
        assert all(w.grad is not None for w in m.trained(net).values()) and all('lora' in k for k in m.trained(net))
    assert base.decode(x0).shape == (1, 3, 1024, 1024)
    assert m.bottleneck(base, student, x0, steps[:1], y).shape == (1, m.encoder_channels(student)[-1], 64, 64)
    reward = latent_reward_of(base, student)
    assert reward.visual_projection.weight.shape == (1280, config.get('num_layers', 24) // 2 * 64 * student.config.num_attention_heads)
    assert reward(x0, steps[:1], [torch.cat([a, a]) for a in y]).shape == (1,)


# -------------------------------------------------------------------------------------------------------- the scripts

SHORT = ['--iters', 4, '--batch', 4, '--micro', 4, '--save_every', 2, '--sample_every', 0, '--log_every', 2]


def run(out, recipe, *flags, ranks=0, script='train_stage1.py'):
    done = start(script, '--recipe', recipe, *SHORT, '--out', out, *flags, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope='session')
def sd3(tmp_path_factory):
    """Four iterations of the toy SD3's recipe; the run's folder and what it printed."""
    out = tmp_path_factory.mktemp('sd3') / 'run'
    return out, run(out, 'toy-sd3')


@pytest.fixture(scope='session')
def lora(tmp_path_factory):
    """Four iterations of the toy SDXL with adapters."""
    out = tmp_path_factory.mktemp('lora') / 'run'
    return out, run(out, 'toy', '--lora', 8, '--student_lr', 1e-3)


def test_the_sd3_recipe_trains_adapters(sd3):
    out, said = sd3
    assert 'steps [1000, 900, 750, 500]' in said and 'LoRA, rank 32' in said
    assert {k.split(':')[0] for k in weights(out, 4)} == {f'{n}{o}.safetensors' for n in ('student', 'fake', 'heads') for o in ('', '.opt')}
    assert all('lora' in k for k in weights(out, 4) if k.startswith('student.safetensors'))
    assert sum(f.stat().st_size for f in (out / 'student').rglob('*')) < 2e6


@pytest.mark.parametrize('family', ['sd3', 'lora'])
def test_two_ranks_and_resume_with_adapters(family, request, tmp_path):
    out, _ = request.getfixturevalue(family)
    flags = ['toy-sd3'] if family == 'sd3' else ['toy', '--lora', 8, '--student_lr', 1e-3]
    if family == 'sd3':                                                                    # stage 2 below has the other
        run(tmp_path / 'two', *flags, '--micro', 1, ranks=2)
        assert largest_difference(weights(out, 4), weights(tmp_path / 'two', 4), '.safetensors') < 2e-4
    shutil.copytree(out, tmp_path / 'again')
    shutil.rmtree(tmp_path / 'again/state-0000004')
    assert 'from iteration 2' in run(tmp_path / 'again', *flags)
    assert largest_difference(weights(out, 4), weights(tmp_path / 'again', 4)) == 0


@pytest.mark.parametrize('family', ['sd3', 'lora'])
def test_sampling_and_merging(family, request, tmp_path):
    """sample.py on a LoRA student, on the pipeline it merges to, and plain load_lora_weights draw the same picture."""
    from PIL import Image
    import numpy as np
    out, _ = request.getfixturevalue(family)
    for command in [['--ckpt', out], ['--ckpt', out, '--merge', tmp_path / 'merged'], ['--ckpt', tmp_path / 'merged'], ['--ckpt', out, '--teacher']]:
        name = tmp_path / f'{len(list(tmp_path.iterdir()))}.png'
        done = start('sample.py', *command, '--n', 1, '--prompt', PROMPTS[0], '--out', name)
        assert done.returncode == 0, done.stderr[-2000:]
    a, b, teacher = (np.asarray(Image.open(f), np.float32) for f in sorted(tmp_path.glob('*.png')))
    assert np.abs(a - b).max() <= 1 and np.abs(a - teacher).mean() > 1
    done = start('sample.py', '--ckpt', out, '--merge', tmp_path / 'merged')
    assert done.returncode == 2 and 'exists' in done.stderr


@pytest.mark.parametrize('family', ['sd3', 'lora'])
def test_stage_2_on_adapters(family, request, tmp_path):
    """It goes on from a LoRA run and from its student alone; the first ratio is exactly 1; ranks agree."""
    out, _ = request.getfixturevalue(family)
    flags = ['--init', out, '--eval_every', 0, '--log_every', 1, '--iters', 3, '--warmup', 0]
    said = run(tmp_path / 'a', '', *flags, script='train_stage2.py')
    assert all(f'{name}: weights and optimiser' in said for name in ('student', 'fake', 'heads'))
    rows = [json.loads(x) for x in (tmp_path / 'a/log.jsonl').read_text().splitlines()]
    assert 'fake' in rows[0] and 'rl/gap' in rows[1] and rows[1]['rl/gap'] > 0
    if family == 'lora':
        run(tmp_path / 'b', '', *flags, '--micro', 2, script='train_stage2.py', ranks=2)
        assert largest_difference(weights(tmp_path / 'a', 3), weights(tmp_path / 'b', 3), '.safetensors') < 1e-3
    shutil.copytree(out / 'student', tmp_path / 'alone')
    said = run(tmp_path / 'c', '', '--init', tmp_path / 'alone', *flags[2:], '--no-joint', '--gan', 'none', '--reward', 'pickscore',
               script='train_stage2.py')
    rows = [json.loads(x) for x in (tmp_path / 'c/log.jsonl').read_text().splitlines()]
    assert rows[0]['rl/ratio'] == 1 and rows[1]['rl/ratio'] != 1
    done = start('sample.py', '--ckpt', tmp_path / 'c', '--n', 1, '--out', tmp_path / 'x.png')
    assert done.returncode == 0, done.stderr[-2000:]


def test_evaluate_a_lora_student(sd3, tmp_path):
    done = start('evaluate.py', '--ckpt', sd3[0], '--teacher', '--teacher_steps', 2, '--n', 4, '--out', tmp_path / 'a.json', '--n_real', 8)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('| ') > 10


def test_the_latent_gan_looks_at_the_middle_of_a_transformer(tmp_path):
    run(tmp_path / 'run', 'toy-sd3', '--gan', 'latent', '--iters', 2)
    assert 'gan/d' in (tmp_path / 'run/log.jsonl').read_text()


def broken(folder, sd3):
    """Things to point flags at."""
    import diffusers
    shutil.copytree(sd3 / 'student', folder / 'short')
    file = folder / 'short/pytorch_lora_weights.safetensors'
    file.write_bytes(file.read_bytes()[:500])
    shutil.copytree(sd3 / 'student', folder / 'other')
    facts = json.loads((folder / 'other/student.json').read_text())
    (folder / 'other/student.json').write_text(json.dumps(facts | dict(base_model='assets/toy/sdxl')))
    shutil.copytree(sd3 / 'student', folder / 'odd')
    (folder / 'odd/student.json').write_text(json.dumps(facts | dict(lora=dict(rank='four'))))
    shutil.copytree(sd3 / 'student', folder / 'wide')
    file = folder / 'wide/pytorch_lora_weights.safetensors'
    save_file({k: torch.cat([v, v], 1) if 'lora_A' in k else v for k, v in load_file(file).items()}, file)
    pipe = m.load_pipeline(FAMILIES['sdxl'], '', torch.float32)
    parts = {k: pipe.components[k] for k in ('vae', 'text_encoder', 'tokenizer', 'unet', 'scheduler')}
    diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None).save_pretrained(folder / 'sd1')


BAD = [
    ('train_stage1.py', ['--lora', 0], '--lora 0'),
    ('train_stage1.py', ['--lora', -3], '--lora -3'),
    ('train_stage1.py', ['--lora', 1000], '--lora 1000'),
    ('train_stage1.py', ['--lora', 4, '--lora_targets', 'nothing'], '--lora_targets nothing'),
    ('train_stage1.py', ['--lora', 4, '--lora_targets', 'norm1'], '--lora_targets norm1'),
    ('train_stage1.py', ['--recipe', 'toy-sd3', '--t5'], '--t5'),
    ('train_stage1.py', ['--t5'], '--t5'),
    ('train_stage1.py', ['--model', 'TMP/sd1'], 'StableDiffusionXLPipeline and StableDiffusion3Pipeline'),
    ('train_stage2.py', ['--init', 'TMP/short'], 'pytorch_lora_weights'),
    ('train_stage2.py', ['--init', 'TMP/other'], 'another base model'),
    ('train_stage2.py', ['--init', 'TMP/wide'], 'another base model'),
    ('train_stage2.py', ['--init', 'assets/toy/student', '--lora', 4], '--lora'),
    ('train_stage2.py', ['--init', 'TMP/run/student', '--no-lora'], '--lora'),
    ('train_stage2.py', ['--init', 'TMP/run', '--reward', 'beauty'], 'invalid choice'),
    ('train_stage2.py', ['--init', 'TMP/run', '--reward', 'pickscore', '--pickscore', 'TMP/nowhere'], '--reward pickscore'),
    ('train_stage2.py', ['--init', 'TMP/run', '--reward', 'latent', '--lrm', 'assets/toy/lrm'], 'with transformer/'),
    ('sample.py', ['--ckpt', 'TMP/short'], 'pytorch_lora_weights'),
    ('sample.py', ['--ckpt', 'TMP/other'], 'another base model'),
    ('sample.py', ['--ckpt', 'TMP/odd'], 'student.json'),
    ('sample.py', ['--ckpt', 'TMP/run', '--merge', 'TMP/short'], '--merge'),
]


def test_what_adapters_and_families_refuse(sd3, tmp_path):
    shutil.copytree(sd3[0], tmp_path / 'run')
    broken(tmp_path, sd3[0])
    before = listing(tmp_path)

    def call(bad):
        script, flags, _ = bad
        extra = ['--recipe', 'toy', '--eval_every', 0] if script == 'train_stage2.py' and '--recipe' not in flags else []
        extra = ['--recipe', 'toy'] if script == 'train_stage1.py' and '--recipe' not in flags else extra[2:]
        return start(script, *[str(f).replace('TMP', str(tmp_path)) for f in flags], *extra, *['--iters', 1, '--out', tmp_path.parent / 'o']
                     * script.startswith('train'), timeout=120)

    with ThreadPoolExecutor(2) as pool:
        for (script, flags, names), done in zip(BAD, pool.map(call, BAD)):
            lines = [x for x in done.stderr.splitlines() if x and not x.startswith('usage:')]
            assert done.returncode == 2 and len(lines) == 1 and 'error: ' in lines[0] and names in lines[0], (flags, done.stderr[-1500:])
    assert listing(tmp_path) == before
