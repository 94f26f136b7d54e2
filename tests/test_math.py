"""
The maths of the project against closed forms and independent references: diffusers' schedulers,
Gaussians with known scores, segment_anything's own encoder; and the gradients of the training
scripts, read off the states that they save, against the paper's losses.

    pytest tests/test_math.py
"""

import contextlib
import copy
import functools
import json
import math
import tempfile
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler,
    LCMScheduler)
from safetensors.torch import save_file
from torch.distributions import Normal

import miniatures
import model as m
from conftest import ROOT, alone, inside, rows, weights

BETAS = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear')
EPS = m.Schedule(EulerDiscreteScheduler(**BETAS))
V = m.Schedule(EulerDiscreteScheduler(**BETAS, prediction_type='v_prediction'))
FLOW = m.Schedule(FlowMatchEulerDiscreteScheduler(shift=3.))
T = torch.tensor

@functools.cache
def family(name):
    """The toy SDXL or SD3 or the miniature of another family, loaded once."""
    if (ROOT / 'assets/toy' / name).exists():
        return m.load_base(ROOT / 'assets/toy' / name)
    return m.load_base(miniatures.build(name, tempfile.mkdtemp()))

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

# --------------------------------------------------------------------------------------------------
# the convention

def test_the_students_steps_are_the_papers():
    assert EPS.steps(4).tolist() == [999, 749, 499, 249]
    assert EPS.steps(8).tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert FLOW.steps(4).tolist() == [1000, 900, 750, 500]
    reference = FlowMatchEulerDiscreteScheduler(shift=3.)
    reference.set_timesteps(sigmas=[1, .75, .5, .25])
    assert torch.allclose(FLOW.steps(4), reference.timesteps.float())

def test_split_by_snr():
    """DESIGN section 1.1's table: SNR .00468, .0600, .384, 2.08, so 249 alone is low noise; SD3's
    t = 500 counts as low."""
    assert torch.allclose(EPS.snr(EPS.steps(4)), T([.00468, .0600, .384, 2.08]), rtol=5e-3)
    assert EPS.low_noise(EPS.steps(4)).tolist() == [False, False, False, True]
    assert FLOW.low_noise(FLOW.steps(4)).tolist() == [False, False, False, True]

@pytest.mark.parametrize('schedule, reference', [
    (EPS, DDPMScheduler(**BETAS)), (V, DDPMScheduler(**BETAS, prediction_type='v_prediction'))])
def test_noising_and_targets_are_diffusers(schedule, reference):
    x0, eps = normal(2, 6, 4, 8, 8)
    t = T([0, 249, 499, 749, 998, 999])
    assert torch.allclose(
        schedule.noised(x0, eps, t), reference.add_noise(x0, eps, t), atol=1e-5)
    target = eps if schedule is EPS else reference.get_velocity(x0, eps, t)
    assert torch.allclose(schedule.target(x0, eps, t), target, atol=1e-5)

@pytest.mark.parametrize('schedule', [EPS, V, FLOW])
def test_x0_inverts_the_target(schedule):
    x0, eps = normal(2, 4, 4, 8, 8)
    for t in (T([1., 20, 249, 499]), T([500., 749, 980, 999])):
        back = schedule.x0(schedule.target(x0, eps, t), schedule.noised(x0, eps, t), t)
        # fp32 at t = 999 divides by alpha = .068
        assert torch.allclose(back, x0, atol=2e-4)
    half = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    assert schedule.x0(half, half, T([999])).dtype == torch.float32

def test_flow_matches_diffusers_stochastic_step():
    reference = FlowMatchEulerDiscreteScheduler(shift=3., stochastic_sampling=True)
    reference.set_timesteps(sigmas=[1, .75, .5, .25])
    x, v = normal(2, 2, 4, 8, 8)
    stream = torch.Generator().manual_seed(7)
    out = reference.step(v, reference.timesteps[0], x, generator=stream).prev_sample
    now, then = FLOW.steps(4)[:2, None].expand(2, 2)
    ours = FLOW.noised(FLOW.x0(v, x, now), normal(2, 4, 8, 8, seed=7), then)
    assert torch.allclose(out, ours, atol=1e-5)

def test_times_cover_their_range():
    u = torch.linspace(0, 1 - 1e-6, 10_001)
    t = EPS.between(u, 20, 980)
    assert t.min() == 20
    assert t.max() == 980
    assert (t == t.floor()).all()
    assert len(t.unique()) == 961

def test_flow_times_go_through_the_shift():
    """Uniform u -> 3 u / (1 + 2 u) for the DM loss; the median of the fake score's logit-normal
    times is u = 1/2, t = 750."""
    u = (torch.arange(20_000).double() + .5) / 20_000
    for low, high in [(0, 1000), (20, 980)]:
        v = (low + (high - low) * u) / 1000
        assert torch.allclose(FLOW.between(u, low, high), 1000 * 3 * v / (1 + 2 * v))
    t = FLOW.training(u) / 1000
    back = torch.logit(t / (3 - 2 * t))                # unshifted, its logit is a standard normal
    assert abs(back.mean()) < 1e-3
    assert abs(back.std() - 1) < 1e-2
    assert abs(t.median() - .75) < 1e-3
    assert torch.isfinite(FLOW.training(torch.zeros(1))).all()

def test_noise_depends_on_seed_iteration_and_sample_only():
    whole, u = m.draw(0, 5, range(8), (3, 4, 2, 2))
    half, v = m.draw(0, 5, range(4, 8), (3, 4, 2, 2))
    assert torch.equal(whole[4:], half)
    assert torch.equal(u[4:], v)
    assert (whole[1:] - whole[:-1]).flatten(1).abs().mean(1).min() > .5
    assert u.unique().numel() == u.numel()
    for key in (0, 6), (1, 5):
        other, _ = m.draw(*key, range(8), (3, 4, 2, 2))
        assert (whole - other).abs().min(dim=0).values.mean() > .05
    assert abs(whole.mean()) < .2
    assert abs(whole.std() - 1) < .1
    assert 0 <= u.min() and u.max() < 1

@pytest.mark.parametrize('c', [1, .8536, .5, .1464, 0])
def test_dmdrs_times_are_beta(c):
    """Means .727, .714, .667, .573, .5 of a = 1 + 3 c, b = 1 + c / 2, and the spread; the last is
    uniform. No shift for a flow, whole times below 1000 for a table."""
    a, b = 1 + 3 * c, 1 + .5 * c
    u = (torch.arange(20_000).double() + .5) / 20_000
    t = FLOW.beta(u, a, b) / 1000
    assert abs(t.mean() - a / (a + b)) < 1e-5
    assert abs(t.var() - a * b / (a + b) ** 2 / (a + b + 1)) < 1e-5
    if c == 0:
        assert torch.allclose(t, u)
    table = EPS.beta(u, a, b)
    assert torch.equal(table, (1000 * t).round().clamp(max=999))

@pytest.mark.parametrize('schedule, reference', [
    (EPS, DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing='trailing')),
    (FLOW, FlowMatchEulerDiscreteScheduler(shift=3.))])
def test_dmdrs_inputs(schedule, reference):
    """ode: the end of diffusers' DDIM or Euler, noised to step s; sde: the x0 of step s itself; at
    the first step both are pure noise."""
    net = Fake(lambda x, t, y: torch.tanh(x) + .1 * t.view(-1, 1, 1, 1) / 1000)
    base, steps, noise, eps = bare(schedule=schedule), schedule.steps(4), normal(2, 4, 4, 8, 8), \
        normal(2, 4, 8, 8, seed=1)
    if schedule is FLOW:
        reference.set_timesteps(sigmas=[1, .75, .5, .25])
    else:
        reference.set_timesteps(4)
        assert reference.timesteps.tolist() == steps.tolist()
    x = noise[:, 0]
    for t in reference.timesteps:
        x = reference.step(net.answer(x, t.expand(2), None), t, x).prev_sample
    x_s, t_s, sample = m.reach_dmdr(base, net, steps, noise, Y, 2, 'ode', eps)
    assert torch.allclose(sample, x, atol=2e-3 * x.abs().max())
    assert torch.equal(x_s, schedule.noised(sample, eps, t_s)) and int(t_s[0]) == int(steps[2])
    x_s, t_s, sample = m.reach_dmdr(base, net, steps, noise, Y, 2, 'sde', eps)
    assert torch.equal(sample, base.x0(net, *m.reach(base, net, steps, noise, Y, 2), Y))
    assert torch.equal(x_s, schedule.noised(sample, eps, t_s))
    for rollout in ('ode', 'sde'):
        assert torch.equal(m.reach_dmdr(base, net, steps, noise, Y, 0, rollout, eps)[0], eps)

# --------------------------------------------------------------------------------------------------
# backward simulation, guidance, updates

class Fake(nn.Module):
    """A network with SDXL's call that answers with a fixed function of its input, its time and the
    prompt's embedding, and remembers what it was called with."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.calls = []

    def forward(self, x, timestep, encoder_hidden_states, added_cond_kwargs):
        self.calls.append((x.detach().clone(), timestep.clone()))
        return SimpleNamespace(sample=self.answer(x, timestep, encoder_hidden_states))

def bare(kind=m.SDXL, schedule=EPS, size=64, device='cpu', tokens=2, width=3, pooled=3):
    """A base without a pipeline: enough for predict, x0 and what calls them."""
    base = kind.__new__(kind)
    base.schedule = schedule
    base.size = size
    base.device = torch.device(device)
    # autocast does not know the meta device
    base.autocast = contextlib.nullcontext
    base.uncond = [torch.zeros(1, tokens, width, device=device),
                   torch.zeros(1, pooled, device=device)]
    return base

Y = (torch.ones(2, 2, 3), torch.ones(2, 3))

def test_backward_simulation_is_lcm_sampling(monkeypatch):
    """Step by step diffusers' LCMScheduler on 999, 749, 499, 249 with the same noise."""
    import diffusers.schedulers.scheduling_lcm as module
    net = Fake(lambda x, t, y: torch.tanh(x) + .1 * t.view(-1, 1, 1, 1) / 1000)
    steps = EPS.steps(4)
    noise = normal(2, 4, 4, 8, 8)
    got = m.backward_simulation(bare(), net, steps, noise, Y)
    assert not got.requires_grad
    fresh = iter(noise[:, 1:].unbind(1))
    monkeypatch.setattr(module, 'randn_tensor', lambda *a, **k: next(fresh))
    lcm = LCMScheduler(**BETAS, original_inference_steps=4)
    lcm.set_timesteps(4)
    assert lcm.timesteps.tolist() == steps.tolist()
    x = noise[:, 0]
    for t in lcm.timesteps:
        x = lcm.step(net.answer(x, t.expand(2), None), t, x).prev_sample
    assert torch.allclose(got, x, atol=1e-3 * x.abs().max())

def test_backward_simulation_starts_from_pure_noise_and_stops_where_told():
    base = bare()
    net = Fake(lambda x, t, y: x * 0)
    steps = EPS.steps(4)
    noise = normal(2, 4, 4, 8, 8)
    x0 = m.backward_simulation(base, net, steps, noise, Y, stop=2)
    assert [int(t[0]) for _, t in net.calls] == [999, 749]
    assert torch.equal(net.calls[0][0], noise[:, 0])
    # the x0 of the step before, noised with fresh noise
    first = EPS.x0(torch.zeros(1), noise[:, 0], T([999, 999]))
    second = EPS.noised(first, noise[:, 1], T([749, 749]))
    assert torch.allclose(net.calls[1][0], second)
    x_s, t_s = m.reach(base, net, steps, noise, Y, 2)
    assert torch.equal(x_s, EPS.noised(x0, noise[:, 2], t_s))
    assert t_s.tolist() == [499, 499]
    net.calls.clear()
    m.backward_simulation(base, net, steps, noise, Y, first=2, x0=x0)
    assert [int(t[0]) for _, t in net.calls] == [499, 249]
    assert m.backward_simulation(base, net, steps, noise, Y, stop=0) is None
    assert m.backward_simulation(base, net, steps, noise, Y, first=4, x0=x0) is x0

def test_guidance_is_uncond_plus_w_times_difference():
    base = bare()
    # cond answers +1 more than uncond
    net = Fake(lambda x, t, y: x * .1 + y.mean((1, 2)).view(-1, 1, 1, 1))
    x = normal(2, 4, 8, 8)
    t = T([499, 749])
    assert torch.allclose(base.x0(net, x, t, Y, cfg=8.), EPS.x0(x * .1 + 8., x, t), atol=1e-4)
    assert torch.allclose(base.x0(net, x, t, Y, cfg=1.), EPS.x0(x * .1 + 1., x, t), atol=1e-5)

def test_update_clips_and_drops_a_non_finite_gradient():
    net = nn.Linear(3, 1)
    opt = torch.optim.AdamW(net.parameters(), lr=.1)
    before = net.weight.detach().clone()
    (net(torch.ones(1, 3)) * float('nan')).sum().backward()
    assert m.update(opt, net) is None
    assert torch.equal(net.weight, before)
    assert net.weight.grad is None
    assert not opt.state
    (5 * net(torch.ones(1, 3))).sum().backward()
    assert abs(m.update(opt, net) - 10) < 1e-5                  # sqrt(3 5^2 + 5^2), clipped to 1
    assert torch.allclose(opt.state[net.weight]['exp_avg'], T([.05]), rtol=1e-4)
    assert not torch.equal(net.weight, before)

# --------------------------------------------------------------------------------------------------
# the training scripts as black boxes: an iteration from networks that differ, at learning rate 0,
# leaves its gradients in the optimiser's state: exp_avg = (1 - .9) x the clipped gradient

BATCH, CFG, WEIGHT = 4, 3., .3

def moved(net, seed, size=.05):
    """net with every trained weight moved a little, by `seed`."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for w in m.trained(net).values():
            spread = max(w.std(correction=0).item(), .02)
            w += size * spread * torch.randn(w.shape, generator=stream)
    return net

def state_of(out, it, nets, **args):
    """Writes what a run would have saved at iteration `it` with these networks, without moments."""
    folder = out / f'state-{it:07d}'
    folder.mkdir(parents=True)
    tensors = {f'{net}.weight/{name}@0': w.detach().contiguous()
               for net in nets for name, w in m.trained(nets[net]).items()}
    file = folder / 'rank0.safetensors'
    save_file(tensors, file)
    entry = [file.stat().st_size, m.crc(file)]
    state = dict(iteration=it, args=args, files={file.name: entry})
    (folder / 'state.json').write_text(json.dumps(state))

def iteration(script, out, it, nets, *flags):
    """One iteration of a script at learning rate 0 from these networks: its log line and, for each
    network, {name: weight} and {name: gradient after clipping} of the state that it leaves; the
    names on its page."""
    rest = dict(rl_ratio=5) if script == 'train_stage2.py' else {}
    model = flags[flags.index('--model') + 1]
    if '--fake_lora' in flags:
        rest['fake_lora'] = flags[flags.index('--fake_lora') + 1]
    ranks = [len(w) for name, w in m.trained(nets['student']).items() if 'lora_A' in name]
    rest['lora'] = ranks[0] if ranks else 0
    state_of(out, it, nets, model=model, **rest)
    more = []
    if script == 'train_stage2.py':
        more = ['--rl_lr', 0, '--eval_every', 0, '--critic_warmup', 0]
    done = inside(
        script, *more, '--out', out, '--iters', it + 1, '--batch', BATCH, '--micro', 2, '--cfg',
        CFG, '--gan_weight', WEIGHT, '--student_lr', 0, '--fake_lr', 0, '--heads_lr', 0, '--warmup',
        0, '--cooldown', 0, '--workers', 0, '--sample_every', 0, '--log_every', 1, *flags)
    assert done.returncode == 0, done.stderr
    row, = rows(out)
    after = {name: {} for name in [*nets, 'logits']}
    grads = {name: {} for name in [*nets, 'rl']}         # rl: of the student, by preference updates
    for key, value in weights(out, it + 1).items():
        net, kind, name = key.replace('/', '.', 1).split('.', 2)
        if kind == 'weight':
            after[net][name] = value
        if kind == 'exp_avg':
            grads[net][name] = value / (1 - .9)
    return row, after, grads, done.page

def samples(base, seed, it):
    """The pictures and captions of iteration `it`."""
    pictures = m.Pictures(
        str(ROOT / 'assets/toy/data'), 'train.parquet', 'image', 'text', base.size, seed)
    batch = [pictures[it * BATCH + i] for i in range(BATCH)]
    return torch.stack([row['pixels'] for row in batch]), [row['text'] for row in batch]

def gradient(loss, net):
    """{name: d loss / d weight} of what net trains, {} where it is not trained by the loss."""
    named = m.trained(net)
    grads = torch.autograd.grad(
        loss, [*named.values()], retain_graph=True, allow_unused=True)
    return {name: g for name, g in zip(named, grads) if g is not None}

def length(grads):
    return torch.stack([g.norm() for g in grads.values()]).norm()

def assert_same_gradient(found, expected):
    """found is `expected` clipped to norm 1, within rounding, with the same names."""
    assert found.keys() == expected.keys()
    size = length(expected)
    assert size > 1e-4
    clip = min(1., 1 / (size + 1e-6))
    rest = {name: found[name] - clip * expected[name] for name in found}
    assert length(rest) < 1e-3 * clip * size, f'off by {length(rest) / clip / size:.1e} of it'

def G(base, net, x, t, y):
    """The student's x0."""
    a, sd = base.schedule.alpha(t), base.schedule.sigma(t)
    out = base.predict(net, x, t, y)
    return x - sd * out if base.schedule.kind == 'flow' else (x - sd * out) / a

def algorithm_1(base, nets, s, it, seed, gan, split, couple, side):
    """The losses of an iteration in one piece, from the paper, at the student's step s; the random
    numbers are those of m.draw in the order of the iteration. Returns the gradients of the three
    networks and the losses; leaves the fake score coupled."""
    student, fake, heads = (nets.get(name) for name in ('student', 'fake', 'heads'))
    flow = base.schedule.kind == 'flow'
    alpha, sigma = base.schedule.alpha, base.schedule.sigma
    eps, u = m.draw(seed, it, range(BATCH), (9, *base.latent_shape))
    eps = eps.unbind(1)
    tau_eps, low_eps, made_eps, fake_eps, real_eps = eps[4:]
    real, texts = samples(base, seed, it)
    y = base.encode(texts)
    at = base.schedule.steps(4)[:, None].expand(4, BATCH)

    def time(u, low, high):
        if not flow:
            return (low + (high + 1 - low) * u).floor()
        v = (low + (high - low) * u) / 1000
        return 3000 * v / (1 + 2 * v)

    def noised(x, eps, t):
        return alpha(t) * x + sigma(t) * eps

    def score(net, x, t, cfg=1.):
        """The score of the marginal at t: -eps / sigma, of a flow's v = eps - x0 too."""
        out = base.predict(net, x, t, y)
        if cfg != 1:
            empty = base.predict(net, x, t, [a.expand_as(b) for a, b in zip(base.uncond, y)])
            out = empty + cfg * (out - empty)
        out = out.double()
        return -(x + alpha(t) * out if flow else out) / sigma(t)

    # the student's input at step s, its x0, and for the GAN what it makes of that at low noise
    with torch.no_grad():
        x = eps[0]
        for k in range(s):
            x = noised(G(base, student, x, at[k], y), eps[k + 1], at[k + 1])
    x0 = z = G(base, student, x, at[s], y)
    if gan != 'none' and split:
        with torch.no_grad():
            end = x0
            for k in range(s + 1, 4):
                end = G(base, student, noised(end, eps[k], at[k]), at[k], y)
        # one step of four is at low noise
        z = G(base, student, noised(end, low_eps, at[3]), at[3], y)

    # eq. 3 and 4
    with torch.no_grad():
        tau = time(u[:, 0], 20, 980)
        x = noised(x0, tau_eps, tau)
        s_real, s_fake = score(base.teacher, x, tau, CFG), score(fake, x, tau)
        r = (x + sigma(tau) ** 2 * s_real) / alpha(tau)                     # Tweedie's formula
        far = (x0 - r).abs().mean((1, 2, 3), keepdim=True)
        push = (s_fake - s_real) * sigma(tau) ** 2 / alpha(tau) / far
    losses = dict(dm=.5 * push.square().mean())
    student_loss = (push * x0).mean()

    # eq. 8 and 9; the latent GAN's are DMD2's
    def crop(x):
        """The same random square, on the latents' grid, of latents and of pixels."""
        share = side / base.size if side else 1
        cells = round(base.latent_shape[-1] * share)
        places = base.latent_shape[-1] - cells + 1
        stream = m.generator(seed, it, 2 ** 31)
        top, left = torch.randint(places, (2,), generator=stream).tolist()
        unit = x.shape[-1] // base.latent_shape[-1]
        return x[..., unit * top:unit * (top + cells), unit * left:unit * (left + cells)]

    def D(x, eps, t):
        if gan == 'latent':
            x = base.features(fake, noised(x, eps, t), t, y)[-1]
        return heads(x)

    made = base.decode(crop(z)) if gan == 'pixel' else z
    if gan == 'pixel':
        losses['gan/g'] = -D(made, made_eps, time(u[:, 1], 0, 999)).mean()
    if gan == 'latent':
        losses['gan/g'] = -F.logsigmoid(D(made, made_eps, time(u[:, 1], 0, 999))).mean()
    if gan != 'none':
        student_loss = student_loss + WEIGHT * losses['gan/g']
    grads = dict(student=gradient(student_loss, student))

    # eq. 11, and then the fake score's own loss, eq. 6
    with torch.no_grad():
        for psi, theta in zip(m.trained(fake).values(), m.trained(student).values()):
            psi.copy_(couple * psi + (1 - couple) * theta)
    clean, made = x0.detach(), made.detach()
    t = time(u[:, 2], 0, 999)
    if flow:
        v = Normal(0., 1.).icdf(u[:, 2]).sigmoid()              # SD3's logit-normal, shifted
        t = 3000 * v / (1 + 2 * v)
    target = fake_eps - clean if flow else fake_eps
    out = base.predict(fake, noised(clean, fake_eps, t), t, y)
    losses['fake'] = own = (out - target).square().mean()
    if gan != 'none':
        t = time(u[:, 3], 0, 999)
        at_real = D(crop(real) if gan == 'pixel' else base.latents(real), real_eps, t)
        at_made = D(made, made_eps, t)
        if gan == 'pixel':
            d = (1 - at_real).clamp(min=0).mean() + (1 + at_made).clamp(min=0).mean()
            grads['heads'] = gradient(d, heads)
        else:
            d = -F.logsigmoid(at_real).mean() - F.logsigmoid(-at_made).mean()
            own = own + .01 * d                  # D is the fake score's own half, with a weight
            grads['heads'] = gradient(own, heads)
        losses['gan/d'] = d
    grads['fake'] = gradient(own, fake)
    return grads, losses

ITERATIONS = {      # script, family, --lora, then --seed, --gan, --split, --couple and --gan_crop
    'pixel': ('train_stage1.py', 'sdxl', 0, 1, 'pixel', True, .9, 0),
    'latent': ('train_stage1.py', 'sdxl', 0, 10, 'latent', False, 1., 0),
    'sd3-pixel-crop': ('train_stage1.py', 'sd3', 4, 2, 'pixel', True, .9, 32),
    'sd3-latent': ('train_stage1.py', 'sd3', 4, 3, 'latent', False, .9, 0),
    'sd3-none': ('train_stage1.py', 'sd3', 0, 7, 'none', True, .9, 0),
    'stage2-latent-split': ('train_stage2.py', 'sdxl', 32, 3, 'latent', True, .9, 0)}

@pytest.mark.parametrize('case', ITERATIONS)
def test_the_gradients_of_an_iteration_are_the_papers(case, tmp_path):
    """Algorithm 1, and DMD2's losses without the split: every gradient that one iteration of the
    real script leaves, its log, and the weights, of which only the coupling moves any."""
    script, name, rank, seed, gan, split, couple, side = ITERATIONS[case]
    base = family(name)
    lora = m.lora_config(base.teacher, rank, 2. * rank, 'attention') if rank else None
    torch.manual_seed(0)
    nets = {net: moved(base.trainable(lora), k) for k, net in enumerate(('student', 'fake'))}
    if gan == 'pixel':
        sam = m.load_sam_encoder(str(ROOT / 'assets/toy/sam.pth'))
        nets['heads'] = m.PixelDiscriminator(sam, base.size)
    if gan == 'latent':
        nets['heads'] = m.Head(base.channels(base.teacher)[-1])
    it = 6 if script == 'train_stage2.py' else 1         # stage 2 distils in every sixth iteration
    where = ['--init', 'assets/toy/student'] if it == 6 else ['--lora', rank]
    row, after, grads, _ = iteration(
        script, tmp_path / 'run', it, nets, *where, '--recipe', 'toy-sd3' if name == 'sd3' else
        'toy', '--model', f'assets/toy/{name}', '--seed', seed, '--gan', gan,
        '--split' if split else '--no-split', '--couple', couple, '--gan_crop', side)
    steps = base.schedule.steps(4).long().tolist()
    s, = [k for k in range(4) if f'dm/{steps[k]}' in row]
    expected, losses = algorithm_1(base, nets, s, it, seed, gan, split, couple, side)
    for net in nets:
        assert_same_gradient(grads[net], expected[net])
        for k, w in m.trained(nets[net]).items():
            assert torch.allclose(after[net][k], w, rtol=1e-6, atol=1e-7), (net, k)
    assert abs(row['norm/student'] - length(expected['student'])) < 1e-3 * row['norm/student']
    losses[f'dm/{steps[s]}'] = losses.pop('dm')
    for key, value in losses.items():
        assert abs(row[key] - value) < 1e-3 * abs(value) + 1e-6, key

def merged(base, net, scale):
    """The teacher with scale x B A of net's adapters added to its weights."""
    whole, own = copy.deepcopy(base.teacher), dict(net.named_parameters())
    with torch.no_grad():
        for name, A in own.items():
            if '.lora_A.' in name:
                B = own[name.replace('.lora_A.', '.lora_B.')]
                whole.get_submodule(name.split('.lora_A.')[0]).weight += scale * B @ A
    return whole

DYNA = {             # family, --lora, --rollout, updates of 8 so far, --dyna, --cfg, adapters moved
    'half-way': ('sdxl', 0, 'sde', 4, .5, 3., True),
    'over': ('sd3', 4, 'ode', 8, .5, 3., True),
    'guidance-alone': ('sdxl', 0, 'ode', 0, .5, 3., False),
    'untrained': ('sd3', 4, 'sde', 0, .5, 1., False),
    'same-scale': ('sd3', 4, 'sde', 0, 2., 1., True)}

@pytest.mark.parametrize('case', DYNA)
def test_the_gradients_of_dmdrs_cold_start(case, tmp_path):
    """The fake score has 2 B A, the real one s_r B A on the teacher; of the DM gradient this leaves
    exactly 0 without guidance where B is 0 or the scales are the same, guidance alone where B is 0,
    the plain teacher in the end. Times are Beta's; the fake score learns the rollout's sample."""
    name, rank, rollout, k, dyna, cfg, trained = DYNA[case]
    base = family(name)
    alpha, sigma = base.schedule.alpha, base.schedule.sigma
    torch.manual_seed(0)
    lora = m.lora_config(base.teacher, rank, 2. * rank, 'attention')
    lora_f = m.lora_config(base.teacher, 6, 12., 'attention')
    nets = dict(student=moved(base.trainable(lora), 0), fake=base.trainable(lora_f))
    if trained:
        moved(nets['fake'], 1, .5)
    it, seed = 2 * k, 3
    row, after, grads, _ = iteration(
        'train_stage1.py', tmp_path / 'run', it, nets, '--recipe', 'toy-dmdr', '--model',
        f'assets/toy/{name}', '--seed', seed, '--lora', rank, '--fake_lora', 6, '--ttur', 2,
        '--dyna', dyna, '--dyna_iters', 8, '--cfg', cfg, '--rollout', rollout)
    for net in nets:
        assert all(torch.equal(after[net][k], w) for k, w in m.trained(nets[net]).items())
    steps = base.schedule.steps(4)
    s, = [k for k in range(4) if f'dm/{int(steps[k])}' in row]
    eps, u = m.draw(seed, it, range(BATCH), (10, *base.latent_shape))
    y = base.encode(samples(base, seed, it)[1])
    at = steps[:, None].expand(4, BATCH)
    student = nets['student']

    # the rollout, the student's input at step s and its sample there
    with torch.no_grad():
        x = eps[:, 0]
        for j in range(4 if rollout == 'ode' else s + 1):
            seen = G(base, student, x, at[j], y)
            left = (x - alpha(at[j]) * seen) / sigma(at[j])
            if j < 3:
                noise = left if rollout == 'ode' else eps[:, j + 1]
                x = alpha(at[j + 1]) * seen + sigma(at[j + 1]) * noise
    x = alpha(at[s]) * seen + sigma(at[s]) * eps[:, 9] if s else eps[:, 9]
    x0 = G(base, student, x, at[s], y)

    # times by the inverse of Beta's distribution, which is found by bisection
    c = (1 + math.cos(math.pi * k / 8)) / 2
    a, b = 1 + 3 * c, 1 + c / 2
    grid = torch.linspace(0, 1, 2_000_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(grid ** (a - 1) * (1 - grid) ** (b - 1), grid)
    tau, t = (1000 * grid[torch.searchsorted(mass / mass[-1], v.double())] for v in u[:, [0, 2]].T)
    if name == 'sdxl':
        tau, t = tau.round().clamp(max=999), t.round().clamp(max=999)

    # eq. 3 and 4 with both scores from merged weights
    real, fake = merged(base, nets['fake'], dyna * c), merged(base, nets['fake'], 2.)
    with torch.no_grad():
        x_tau = alpha(tau) * x0 + sigma(tau) * eps[:, 4]
        uncond = [a.expand_as(b) for a, b in zip(base.uncond, y)]
        cond = G(base, real, x_tau, tau, y)
        r = G(base, real, x_tau, tau, uncond)
        r = r + cfg * (cond - r)
        push = (G(base, fake, x_tau, tau, y) - r) / (x0 - r).abs().mean((1, 2, 3), keepdim=True)
    if cfg == 1:
        assert row['grad/dm'] == 0 and not any(g.any() for g in grads['student'].values())
    else:
        assert_same_gradient(grads['student'], gradient((push * x0).mean(), student))
        assert abs(row[f'dm/{int(steps[s])}'] - .5 * push.square().mean()) < 1e-3
    if not trained:                                  # there guidance is all that is in it
        assert torch.allclose(r - G(base, fake, x_tau, tau, y), (cfg - 1) * (
            cond - G(base, base.teacher, x_tau, tau, uncond)), atol=1e-3)
    noisy = base.schedule.noised(seen, eps[:, 7], t)
    out = base.predict(nets['fake'], noisy, t, y)
    loss = (out - base.schedule.target(seen, eps[:, 7], t)).square().mean()
    assert_same_gradient(grads['fake'], gradient(loss, nets['fake']))

PAIRS = {                                                # family, seed, --reward, --clamp, --beta
    'latent': ('sdxl', 1, 'latent', 0., 10.),
    'clamped': ('sdxl', 1, 'latent', .008, 10.),
    'sd3-pickscore': ('sd3', 2, 'pickscore', 0., 10.)}

@pytest.mark.parametrize('case', PAIRS)
def test_the_gradient_of_a_preference_update_is_the_papers(case, tmp_path, monkeypatch):
    """Eq. 12 and 13 on two Gaussians, log-densities in float64: of a pair, H is the difference of
    the log-ratios of winner and loser, means over D dimensions, and

        dL/dx0 = -beta sigmoid(-beta H) (alpha / sigma^2) (w - l) / (D x batch)

    --clamp takes the gradient from a log-ratio beyond it. A sample with a NaN among its rewards
    teaches nothing."""
    from rewards import PickScore
    name, seed, kind, clamp, beta = PAIRS[case]
    base = family(name)
    alpha, sigma = base.schedule.alpha, base.schedule.sigma
    it, K, rank = 1, 3, 4
    lora = m.lora_config(base.teacher, rank, 2. * rank, 'attention')
    torch.manual_seed(0)
    reference = moved(base.trainable(lora), 0)
    facts = dict(base_model=f'assets/toy/{name}', recipe='toy', iteration=9, prompts=['a star'])
    steps = base.schedule.steps(4)
    (tmp_path / 'init').mkdir()
    with alone():
        m.save_student(tmp_path / 'init/student', base, reference, steps, 'float32', facts, lora)
    student = moved(copy.deepcopy(reference), 1, 1.)
    nets = dict(student=student, fake=reference)

    # in the script's first call the second sample has a NaN among its rewards
    forward = m.LatentReward.forward
    calls = []

    def spoilt(self, *inputs):
        r = forward(self, *inputs)
        if not calls:
            r[K] = float('nan')
        calls.append(r)
        return r

    with monkeypatch.context() as patch:
        patch.setattr(m.LatentReward, 'forward', spoilt)
        row, after, grads, _ = iteration(
            'train_stage2.py', tmp_path / 'run', it, nets, '--init', tmp_path / 'init', '--recipe',
            'toy-sd3' if name == 'sd3' else 'toy', '--model', f'assets/toy/{name}', '--reward',
            kind, '--no-joint', '--gan', 'none', '--seed', seed, '--rl_steps', 'all',
            '--candidates', K, '--clamp', clamp, '--beta', beta)
    assert not grads['fake'] and not grads['student'] and 'fake' not in row
    for net in nets:
        assert all(torch.equal(after[net][k], w) for k, w in m.trained(nets[net]).items())

    # the student's input at step s, its x0 and the reference's
    s, = [k for k in range(4) if f'reward/{int(steps[k])}' in row]
    eps, _ = m.draw(seed, it, range(BATCH), (4 + K, *base.latent_shape))
    texts = samples(base, seed, it)[1]
    y = base.encode(texts)
    x = eps[:, 0]
    at = steps[:, None].expand(4, BATCH)
    with torch.no_grad():
        for k in range(s):
            x = base.schedule.noised(base.x0(student, x, at[k], y), eps[:, k + 1], at[k + 1])
        x_ref = base.x0(reference, x, at[s], y)
    x0 = base.x0(student, x, at[s], y)

    # the sampler's own next states, and which of them the reward likes best and least
    a, sd = alpha(at[s + 1]), sigma(at[s + 1])
    each = [text for text in texts for _ in range(K)]
    t = at[s + 1].repeat_interleave(K)
    with torch.no_grad():
        z = (a * x0)[:, None] + sd[:, None] * eps[:, 4:]
        if kind == 'latent':
            lrm = m.load_latent_reward(str(ROOT / 'assets/toy/lrm'), base)
            r = lrm(z.flatten(0, 1), t, lrm.encode(each)).view(BATCH, K)
            r[1] = 0
        else:
            pixels = base.decode(base.x0(student, z.flatten(0, 1), t, base.encode(each)))
            judge = PickScore(str(ROOT / 'assets/toy/pickscore'))
            r = judge.score((pixels / 2 + .5).clamp(0, 1), each).view(BATCH, K)
    w, l = z[range(BATCH), r.argmax(1)], z[range(BATCH), r.argmin(1)]
    sound = T([1., float(kind != 'latent'), 1, 1])

    def log_ratio(z):
        p, p_ref = (Normal(a * x.double(), sd.double()) for x in (x0.detach(), x_ref))
        return (p.log_prob(z.double()) - p_ref.log_prob(z.double())).mean((1, 2, 3))

    least, most = (math.log(1 - clamp), math.log(1 + clamp)) if clamp else (-9, 9)
    H = log_ratio(w).clamp(least, most) - log_ratio(l).clamp(least, most)
    slope = 0.
    within = []
    for z, sign in (w, 1), (l, -1):
        inside = (least < log_ratio(z)) & (log_ratio(z) < most)
        within.append(inside)
        # d log p / d x0; between winner and loser the x0 in it cancels
        slope = slope + sign * inside.view(-1, 1, 1, 1) * a * (z - a * x0.detach()) / sd ** 2
    factor = sound * -beta * torch.sigmoid(-beta * H) / x0.numel()
    expected = gradient((factor.view(-1, 1, 1, 1) * slope * x0).sum(), student)
    if case == 'clamped':
        assert 0 < sum(inside.sum() for inside in within) < 2 * BATCH
    assert_same_gradient(grads['rl'], expected)
    L = -F.logsigmoid(beta * H) * sound
    for key, value in {
            'rl/loss': L.mean(), 'rl/ratio': H.exp().mean(), 'rl/unsound': 1 - sound.mean(),
            'rl/gap': (r.amax(1) - r.amin(1)).mean(), f'reward/{int(steps[s])}': r.mean()}.items():
        assert abs(row[key] - value) < 1e-3 * abs(value) + 1e-6, key

def parts_of_stage_2(name, gan, folder):
    """A base, its student and fake score, both with adapters, heads, and the student on the disk,
    from which stage 2 begins."""
    base = family(name)
    lora = m.lora_config(base.teacher, 4, 8., 'attention')
    torch.manual_seed(0)
    student = moved(base.trainable(lora), 0)
    facts = dict(base_model=f'assets/toy/{name}', recipe='toy', iteration=9, prompts=['a star'],
                 steps=[])
    folder.mkdir()
    nets = dict(student=student, fake=moved(copy.deepcopy(student), 1, 1.))
    if gan == 'latent':
        nets['heads'] = m.Head(base.channels(base.teacher)[-1])
    return base, lora, nets, facts

GROUPS = {        # family, --reward, --steps, --seed, by how much D favours real pictures
    'sd3-pickscore': ('sd3', 'pickscore', 2, 2, 0.),
    'discriminator': ('sdxl', 'discriminator', 4, 5, 0.),
    'constant': ('sdxl', 'discriminator', 4, 5, None)}

@pytest.mark.parametrize('case', GROUPS)
def test_the_gradient_of_a_policy_update(case, tmp_path):
    """GRPO's at x0 is -R alpha' n / (sigma' D) where the next state is alpha' x0 + sigma' n: the
    ratio is exactly 1 and its slope that of log p, in float64. R is the mean of what is to come,
    each state's reward over its group's mean, by the pooled deviation. The heads learn from the
    same logits, at their weight in a distillation, and the fake score from nothing; a D that is
    constant moves no bit of the student, its moments neither."""
    name, kind, S, seed, side = GROUPS[case]
    constant = case == 'constant'
    pixels = kind == 'pickscore'
    gan = 'none' if pixels else 'latent'
    base, lora, nets, facts = parts_of_stage_2(name, gan, tmp_path / 'init')
    schedule, it, K = base.schedule, 1, 2
    steps = schedule.steps(S)
    with alone():
        m.save_student(tmp_path / 'init/student', base, nets['student'], steps, 'float32', facts,
                       lora)
    if constant:
        nn.init.zeros_(nets['heads'][-1].weight)
    kept = {}
    if not pixels:
        kept['logits'] = nn.ParameterDict(
            {x: torch.full((S, 512), math.inf) for x in ('real', 'made')})
    row, after, grads, page = iteration(
        'train_stage2.py', tmp_path / 'run', it, nets | kept, '--init', tmp_path / 'init',
        '--recipe', 'toy-sd3' if name == 'sd3' else 'toy', '--model', f'assets/toy/{name}', '--rl',
        'grpo', '--reward', kind, '--no-joint', '--gan', gan, '--seed', seed, '--candidates', K,
        '--no-split', '--couple', 1, '--gan_weight', 0)
    for net in nets:
        assert all(torch.equal(after[net][k], w) for k, w in m.trained(nets[net]).items())
    assert not grads['fake']

    # rollouts; samples 0 and 1 are a group, 2 and 3 another: one prompt, one first noise
    eps, _ = m.draw(seed, it, range(BATCH), (2 * S, *base.latent_shape))
    eps[1::2, 0] = eps[::2, 0]
    real, captions = samples(base, seed, it)
    texts = [captions[i - i % K] for i in range(BATCH)]
    y = base.encode(texts)
    student = nets['student']
    at = [*steps[:, None].expand(S, BATCH), torch.zeros(BATCH)]
    z, x = [eps[:, 0]], []
    with torch.no_grad():
        for k in range(S):
            x.append(base.x0(student, z[k], at[k], y))
            z.append(schedule.noised(x[k], eps[:, k + 1], at[k + 1]) if k + 1 < S else x[k])

    def D(z, t, texts):
        return nets['heads'](base.features(nets['fake'], z, t, base.encode(texts))[-1])[:, 0]

    if pixels:
        from rewards import PickScore
        judge = PickScore(str(ROOT / 'assets/toy/pickscore'))
        with torch.no_grad():
            r = judge.score((base.decode(z[S]) / 2 + .5).clamp(0, 1), texts)[:, None]
        spread, sound = r.std(0), T([True])
    else:
        clean = base.latents(real)
        levels = range(1, S + 1)
        photos = [schedule.noised(clean, eps[:, S + k], at[k]) if k < S else clean for k in levels]
        r = torch.stack([D(z[k], at[k], texts) for k in levels], 1)
        r_real = torch.stack([D(photos[k - 1], at[k], captions) for k in levels], 1)
        if not constant:
            loss = .01 * (F.softplus(-r_real).mean() + F.softplus(r).mean())
            assert_same_gradient(grads['heads'], gradient(loss, nets['heads']))
        r, r_real = r.detach(), r_real.detach()
        more = (r_real[:, None] > r).double() + .5 * (r_real[:, None] == r)
        share = more.mean((0, 1))
        assert torch.allclose(share, T([row[f'auc/{int(t[0])}'] for t in at[1:]]).double())
        sound = (.55 < share) & (share < .98)
        assert constant or 0 < sound.sum() < S
        assert torch.allclose(after['logits']['real'][:, -BATCH:], r_real.T, atol=1e-5)
        assert after['logits']['made'][:, :-BATCH].isinf().all()
        spread = torch.cat([r_real, r]).std(0)
    if constant:
        assert row['rl/advantage'] == 0 and not sound.any()
        assert not grads['rl'] and 'rl/ratio' not in row
        return
    over = torch.cat([g - g.mean(0) for g in r.double().split(K)])
    A = over / torch.maximum(over.square().mean(0).sqrt(), .1 * spread.double()) * sound
    assert abs(A.unflatten(0, (-1, K)).sum(1)).max() < 1e-12
    assert row['rl/ratio'] == 1
    loss = 0.
    for k in range(S - 1):
        x0 = base.x0(student, z[k], at[k], y)
        R = A[:, -1] if pixels else A[:, k:].mean(1)
        assert R.abs().max() < 5
        a, sd = schedule.alpha(at[k + 1]).double(), schedule.sigma(at[k + 1]).double()
        slope = -R.view(-1, 1, 1, 1) * a * eps[:, k + 1] / (sd * x0[0].numel())
        loss = loss + (slope * x0).sum() / (BATCH * (S - 1))
    assert not grads['student']
    assert_same_gradient(grads['rl'], gradient(loss, student))

    # the advantages by themselves: one member has none, a NaN silences its group alone
    advantages = page['advantages']
    assert not advantages(r, 1, T(0.)).any()
    spoilt = torch.cat([r, r])
    spoilt[0, 0] = math.nan
    assert not advantages(spoilt, K, T(0.))[:K, 0].any()
    assert advantages(spoilt, K, T(0.))[K:, 0].any()
    assert not advantages(torch.full((4, 1), .1), K, T(0.)).any()
    assert torch.allclose(advantages(r, K, T(9.)).double(), over / 9)

    # a linear D = <w, z>: what makes its states likelier moves them along w
    w, n = normal(64), normal(8000, 64, seed=1)
    along = advantages((n @ w)[:, None], K, T(0.)).T @ n
    assert F.cosine_similarity(along[0], w, dim=0) > .95

def test_the_gradient_of_refl(tmp_path):
    """DMDR's: that of DM plus the weighted sum of relu(goal - cosine), through the VAE; a picture
    that is good enough adds nothing."""
    from rewards import Clip, PickScore
    base, lora, nets, facts = parts_of_stage_2('sdxl', 'none', tmp_path / 'init')
    steps, it, seed, goal, each = base.schedule.steps(4), 1, 4, .68, (3., 4.)
    with alone():
        m.save_student(tmp_path / 'init/student', base, nets['student'], steps, 'float32', facts,
                       lora)
    row, after, grads, _ = iteration(
        'train_stage2.py', tmp_path / 'run', it, nets, '--init', tmp_path / 'init', '--recipe',
        'toy', '--model', 'assets/toy/sdxl', '--rl', 'refl', '--reward', 'pickscore', 'clip',
        '--reward_weight', *each, '--goal', goal, '--gan', 'none', '--seed', seed, '--couple', 1)
    s, = [k for k in range(4) if f'dm/{int(steps[k])}' in row]
    expected, _ = algorithm_1(base, nets, s, it, seed, 'none', True, 1., 0)
    eps, _ = m.draw(seed, it, range(BATCH), (9, *base.latent_shape))
    texts = samples(base, seed, it)[1]
    y = base.encode(texts)
    x0 = base.x0(nets['student'], *m.reach(
        base, nets['student'], steps, eps[:, :4], y, s), y)
    pixels = (base.decode(x0) / 2 + .5).clamp(0, 1)
    cosines = [PickScore(str(ROOT / 'assets/toy/pickscore')).score(pixels, texts),
               Clip(str(ROOT / 'assets/toy/clip')).score(pixels, texts) / 100]
    assert 0 < sum((r > goal).sum() for r in cosines) < 2 * BATCH
    loss = sum(w * (goal - r).clamp(min=0).mean() for w, r in zip(each, cosines))
    pull = gradient(loss, nets['student'])
    assert length(pull) > .1 * length(expected['student'])
    total = {k: g + pull[k] for k, g in expected['student'].items()}
    assert_same_gradient(grads['student'], total)
    assert_same_gradient(grads['fake'], expected['fake'])
    assert abs(row['reward/pickscore'] - cosines[0].mean()) < 1e-4

# --------------------------------------------------------------------------------------------------
# SAM discriminator

def sam_of(**sizes):
    """segment_anything's Sam with an encoder of these sizes, rel_pos and pos_embed not zero."""
    from segment_anything.modeling import ImageEncoderViT, Sam
    encoder = ImageEncoderViT(
        patch_size=16, out_chans=256, use_rel_pos=True, window_size=14, mlp_ratio=4,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6), **sizes)
    with torch.no_grad():
        for name, w in encoder.named_parameters():
            if 'rel_pos' in name or 'pos_embed' in name:
                w.normal_(0, .02)
    return Sam(encoder, nn.Module(), nn.Module()).eval()

def test_features_are_segment_anythings(tmp_path):
    """vit_b's width and windows, at 320 px and four blocks: the last global block's features, sent
    through the encoder's own neck, are the encoder's output."""
    torch.manual_seed(0)
    sam = sam_of(img_size=320, embed_dim=768, depth=4, num_heads=12, global_attn_indexes=[1, 3])
    file = tmp_path / 'sam.pth'
    torch.save(sam.state_dict(), file)
    encoder = m.load_sam_encoder(str(file))
    assert encoder.img_size == 320
    disc = m.PixelDiscriminator(encoder, 640)              # pictures are resized to the encoder's
    assert disc.blocks == [1, 3]
    x = torch.rand(1, 3, 640, 640) * 2 - 1
    with torch.no_grad():
        features = disc.features(x)
        assert [tuple(f.shape) for f in features] == [(1, 768, 20, 20)] * 2
        small = F.interpolate(x, (320, 320), mode='bilinear', antialias=True)
        reference = sam.image_encoder(sam.preprocess((small + 1) * 127.5))
        assert torch.allclose(sam.image_encoder.neck(features[-1]), reference, atol=1e-3)
        crop = x[..., :160, :160]
        assert disc(crop).shape == (1, 2)
        assert [tuple(f.shape) for f in disc.features(crop)] == [(1, 768, 5, 5)] * 2

@pytest.mark.parametrize('name, blocks', [
    ('vit_b', [2, 5, 8, 11]), ('vit_l', [5, 11, 17, 23]), ('vit_h', [7, 15, 23, 31])])
def test_sams_sizes_are_read_off_the_state(name, blocks):
    import segment_anything
    with torch.device('meta'):
        state = segment_anything.sam_model_registry[name]().state_dict()
        encoder = m.build_sam_encoder(state)
        assert m.PixelDiscriminator(encoder, 1024).blocks == blocks
    prefix = 'image_encoder.'
    reference = {k.removeprefix(prefix): v.shape for k, v in state.items() if prefix in k}
    assert {k: v.shape for k, v in encoder.state_dict().items()} == reference
    assert encoder.img_size == 1024

def test_discriminator_is_differentiable_in_the_pixels_and_trains_heads_only():
    torch.manual_seed(0)
    disc = m.PixelDiscriminator(m.load_sam_encoder(str(ROOT / 'assets/toy/sam.pth')), 64)
    x = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    disc(x).mean().backward()
    assert x.grad.abs().sum() > 0
    assert all((w.grad is not None) == ('heads' in k) for k, w in disc.named_parameters())
    again = m.PixelDiscriminator(disc.encoder, 64, checkpointing=True)
    again.heads = disc.heads
    z = x.detach().clone().requires_grad_()
    again(z).mean().backward()
    assert torch.allclose(x.grad, z.grad, atol=1e-7)

# --------------------------------------------------------------------------------------------------
# the latent reward

def lrm_score(reward, stages, cond, uncond, text):
    """LPO's formula of what the network makes of (z, t), averaged: guidance on the last alone."""
    v = torch.cat([*stages, uncond + 7.5 * (cond - uncond)], 1)
    v = v @ reward.visual_projection.weight.T
    return reward.logit_scale.exp() * F.cosine_similarity(v, text)

def reward_of(base):
    torch.manual_seed(0)
    encoders = base.pipe.text_encoder, base.pipe.text_encoder_2
    return m.LatentReward(base, base.trainable().eval(), *encoders)

PROMPTS = ['a red circle on blue', 'a white ring on black', 'a star']

@torch.no_grad()
def test_a_unets_latent_reward_is_lpos():
    """Against a forward pass written out from the UNet's own blocks."""
    base = family('sdxl')
    reward = reward_of(base)
    net = reward.net
    z = normal(3, *base.latent_shape)
    t = T([749., 499., 1.])
    y = reward.encode(PROMPTS)

    def features(e, pooled):
        sizes = T([64., 64, 0, 0, 64, 64]).repeat(3)
        extra = torch.cat([pooled, net.add_time_proj(sizes).view(3, -1)], 1)
        emb = net.time_embedding(net.time_proj(t)) + net.add_embedding(extra)
        h = net.conv_in(z)
        out = []
        for block in net.down_blocks:
            for resnet, attention in zip(block.resnets, block.attentions):
                h = attention(resnet(h, emb), encoder_hidden_states=e).sample
            out.append(h.mean((2, 3)))
            for down in block.downsamplers or []:
                h = down(h)
        return out, net.mid_block(h, emb, encoder_hidden_states=e).mean((2, 3))

    stages, cond = features(y[0][:3], y[1][:3])
    _, uncond = features(y[0][3:], y[1][3:])
    expected = lrm_score(reward, stages, cond, uncond, y[1][:3])
    assert torch.allclose(reward(z, t, y), expected, rtol=1e-4)
    empty = base.pipe.encode_prompt([''], device='cpu', do_classifier_free_guidance=False)[0]
    assert torch.allclose(y[0][3:], empty.expand(3, -1, -1))
    assert empty.abs().sum() > 0

@torch.no_grad()
def test_a_transformers_latent_reward_is_lpos():
    """Against a forward pass written out from the transformer's own first blocks."""
    base = family('sd3')
    reward = reward_of(base)
    net = reward.net
    assert len(net.transformer_blocks) == 3
    z = normal(3, *base.latent_shape)
    t = T([900., 750., 500.])
    y = reward.encode(PROMPTS)
    assert torch.equal(y[0][:3], base.encode(PROMPTS)[0])
    found = []
    for e, pooled in [v[:3] for v in y], [v[3:] for v in y]:
        h, e, emb = net.pos_embed(z), net.context_embedder(e), net.time_text_embed(t, pooled)
        for block in net.transformer_blocks:
            e, h = block(hidden_states=h, encoder_hidden_states=e, temb=emb)
            found.append(h.mean(1))
    tokens = base.pipe.tokenizer_2(PROMPTS, padding='max_length', return_tensors='pt').input_ids
    text = base.pipe.text_encoder_2(tokens).text_embeds
    first, second, cond, _, _, uncond = found
    expected = lrm_score(reward, [first, second], cond, uncond, text)
    assert torch.allclose(reward(z, t, y), expected, rtol=1e-4, atol=1e-4)
