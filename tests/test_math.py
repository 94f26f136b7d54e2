"""
The maths of model.py against closed forms and independent references: diffusers' schedulers, Gaussians with known scores,
segment_anything's own encoder.    pytest tests/test_math.py
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

import model as m

BETAS = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear')
EPS, V = (m.Schedule(EulerDiscreteScheduler(**BETAS, prediction_type=k)) for k in ('epsilon', 'v_prediction'))
FLOW = m.Schedule(FlowMatchEulerDiscreteScheduler(shift=3.))
T = torch.tensor


# --------------------------------------------------------------------------------------------------- the convention

def test_the_students_steps_are_the_papers():
    assert EPS.steps(4).tolist() == [999, 749, 499, 249]
    assert EPS.steps(8).tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert FLOW.steps(4).tolist() == [1000, 900, 750, 500]
    reference = FlowMatchEulerDiscreteScheduler(shift=3.)
    reference.set_timesteps(sigmas=[1, .75, .5, .25])
    assert torch.allclose(FLOW.steps(4), reference.timesteps.float())


def test_split_by_snr():
    """DESIGN section 1.1's table: SNR .00468, .0600, .384, 2.08, so 249 alone is low noise; SD3's t = 500 counts as low."""
    assert torch.allclose(EPS.snr(EPS.steps(4)), T([.00468, .0600, .384, 2.08]), rtol=5e-3)
    assert EPS.low_noise(EPS.steps(4)).tolist() == [False, False, False, True]
    assert FLOW.low_noise(FLOW.steps(4)).tolist() == [False, False, False, True]


@pytest.mark.parametrize('schedule, reference', [
    (EPS, DDPMScheduler(**BETAS)), (V, DDPMScheduler(**BETAS, prediction_type='v_prediction'))])
def test_noising_and_targets_are_diffusers(schedule, reference):
    x0, eps, t = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8), T([0, 249, 499, 749, 998, 999])
    assert torch.allclose(schedule.noised(x0, eps, t), reference.add_noise(x0, eps, t), atol=1e-5)
    target = eps if schedule is EPS else reference.get_velocity(x0, eps, t)
    assert torch.allclose(schedule.target(x0, eps, t), target, atol=1e-5)


@pytest.mark.parametrize('schedule', [EPS, V, FLOW])
def test_x0_inverts_the_target(schedule):
    x0, eps = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    for t in (T([1., 20, 249, 499]), T([500., 749, 980, 999])):
        back = schedule.x0(schedule.target(x0, eps, t), schedule.noised(x0, eps, t), t)
        assert torch.allclose(back, x0, atol=2e-4)          # fp32 at t = 999 divides by alpha = .068
    half = schedule.x0(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), T([999]))
    assert half.dtype == torch.float32


def test_flow_matches_diffusers_stochastic_step():
    reference = FlowMatchEulerDiscreteScheduler(shift=3., stochastic_sampling=True)
    reference.set_timesteps(sigmas=[1, .75, .5, .25])
    x, v = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    out = reference.step(v, reference.timesteps[0], x, generator=torch.Generator().manual_seed(0)).prev_sample
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = FLOW.steps(4)
    assert torch.allclose(out, FLOW.noised(FLOW.x0(v, x, t[:1].expand(2)), noise, t[1:2].expand(2)), atol=1e-5)


def test_times_cover_their_range():
    u = torch.linspace(0, 1 - 1e-6, 10_001)
    t = EPS.between(u, 20, 980)
    assert t.min() == 20 and t.max() == 980 and (t == t.floor()).all() and len(t.unique()) == 961
    ends = [1000 * 3 * v / (1 + 2 * v) for v in (.02, .98)]                                       # shift 3
    assert abs(FLOW.between(u, 20, 980).min() - ends[0]) < 1e-3 and ends[1] - .1 < FLOW.between(u, 20, 980).max() <= ends[1]


# ------------------------------------------------------------------------------- backward simulation, guidance, noise

class Fake(nn.Module):
    """A network with SDXL's call that answers with a fixed function of its input and of the prompt embedding."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls = answer, []

    def forward(self, x, timestep, encoder_hidden_states, added_cond_kwargs):
        self.calls.append((x.detach().clone(), timestep.clone()))
        return SimpleNamespace(sample=self.answer(x, timestep, encoder_hidden_states))


def bare_base(schedule=EPS):
    base = m.Base.__new__(m.Base)
    base.device, base.size, base.schedule, base.part = torch.device('cpu'), 64, schedule, 'unet'
    base.uncond = (torch.zeros(1, 2, 3), torch.zeros(1, 3))
    return base


Y = (torch.ones(2, 2, 3), torch.ones(2, 3))


def test_backward_simulation_is_lcm_sampling():
    """Step by step the same as diffusers' LCMScheduler on 999, 749, 499, 249 with the same noise."""
    base, net = bare_base(), Fake(lambda x, t, y: torch.tanh(x) + .1 * t.view(-1, 1, 1, 1) / 1000)
    steps, noise = EPS.steps(4), torch.randn(2, 4, 4, 8, 8)
    got = m.backward_simulation(base, net, steps, noise, Y)
    lcm = LCMScheduler(**BETAS, original_inference_steps=4)
    lcm.set_timesteps(4)
    assert lcm.timesteps.tolist() == steps.tolist()
    x = noise[:, 0]
    for k, t in enumerate(lcm.timesteps):
        lcm_noise = iter([noise[:, k + 1]]) if k < 3 else iter([])
        import diffusers.schedulers.scheduling_lcm as module
        old, module.randn_tensor = module.randn_tensor, lambda *a, **kw: next(lcm_noise)
        try:
            step = lcm.step(net.answer(x, t.expand(2), None), t, x)
        finally:
            module.randn_tensor = old
        x = step.prev_sample
    assert torch.allclose(got, x, atol=1e-3 * x.abs().max())


def test_backward_simulation_starts_from_pure_noise_and_stops_where_told():
    base, net = bare_base(), Fake(lambda x, t, y: x * 0)
    steps, noise = EPS.steps(4), torch.randn(2, 4, 4, 8, 8)
    x0 = m.backward_simulation(base, net, steps, noise, Y, stop=2)
    assert [int(t[0]) for _, t in net.calls] == [999, 749]
    assert torch.equal(net.calls[0][0], noise[:, 0])
    expected = EPS.noised(EPS.x0(torch.zeros(1), noise[:, 0], T([999, 999])), noise[:, 1], T([749, 749]))
    assert torch.allclose(net.calls[1][0], expected)                        # noised x0 of the step before, fresh noise
    net.calls.clear()
    m.backward_simulation(base, net, steps, noise, Y, first=2, x0=x0)
    assert [int(t[0]) for _, t in net.calls] == [499, 249]
    assert m.backward_simulation(base, net, steps, noise, Y, stop=0) is None


def test_guidance_is_uncond_plus_w_times_difference():
    base = bare_base()
    net = Fake(lambda x, t, y: x * .1 + y.mean((1, 2)).view(-1, 1, 1, 1))     # cond answers +1 more than uncond
    x, t = torch.randn(2, 4, 8, 8), T([499, 749])
    guided = base.x0(net, x, t, Y, cfg=8.)
    assert torch.allclose(guided, EPS.x0(x * .1 + 8., x, t), atol=1e-4)
    assert torch.allclose(base.x0(net, x, t, Y, cfg=1.), EPS.x0(x * .1 + 1., x, t), atol=1e-5)


def test_noise_depends_on_seed_iteration_and_sample_only():
    whole, u = m.draw(0, 5, range(8), (3, 4, 2, 2))
    half, v = m.draw(0, 5, range(4, 8), (3, 4, 2, 2))
    assert torch.equal(whole[4:], half) and torch.equal(u[4:], v)
    others = [m.draw(*key, range(8), (3, 4, 2, 2))[0] for key in [(0, 6), (1, 5)]]
    assert all((whole - o).abs().min(dim=0).values.mean() > .05 for o in others)
    assert abs(whole.mean()) < .2 and abs(whole.std() - 1) < .1 and 0 <= u.min() and u.max() < 1


# ------------------------------------------------------------------------------------------------------- the losses

def gaussian_x0(x, t, mean, std):
    """E[x0 | x_t] when x0 ~ N(mean, std^2), float64: the score of the marginal through Tweedie's formula."""
    a, s = (f(t).double() for f in (EPS.alpha, EPS.sigma))
    score = -(x.double() - a * mean) / (a ** 2 * std ** 2 + s ** 2)
    return (x.double() + s ** 2 * score) / a, score


def test_dm_gradient_on_gaussians():
    """Student N(2, .5^2), teacher N(-1, .8^2), both scores known. The gradient is, in the paper's eq. 3 and 4,
    (s_fake - s_teacher) sigma^2 / alpha over mean|x0 - r|, and a step down it moves the student's mean to the teacher's."""
    x0 = 2 + .5 * torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    t = EPS.between(torch.linspace(0, .999, 64), 20, 980)
    xt = EPS.noised(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)), t)
    real, s_real = gaussian_x0(xt, t, -1., .8)
    fake, s_fake = gaussian_x0(xt, t, 2., .5)
    loss, slope = m.slope(lambda x: m.dm_loss(x, real, fake), x0)
    a, s = (f(t).double() for f in (EPS.alpha, EPS.sigma))
    expected = (s_fake - s_real) * s ** 2 / a / (x0 - real).abs().mean((1, 2, 3), keepdim=True) / x0.numel()
    assert torch.allclose(slope, expected, rtol=1e-4, atol=1e-12)
    assert torch.allclose(loss, .5 * (expected * x0.numel()).square().mean(), rtol=1e-4)
    moved = (x0 - 100 * slope).mean() - x0.mean()
    assert moved < 0, 'a step down the DM loss must move the student towards the teacher'


def test_dm_loss_survives_a_perfect_student():
    x = torch.randn(2, 4, 8, 8)
    loss, slope = m.slope(lambda v: m.dm_loss(v, x, x + 1e-7), x)
    assert torch.isfinite(loss) and torch.isfinite(slope).all()


def test_student_on_a_mixture_moves_to_the_teachers():
    """Four Gaussians in the plane are the teacher, its score exact. A student MLP starts at one wide blob and learns by
    dm_loss with a fake score that learns by the eps-loss: the whole of stage 1's items 1, 2, 5 without pictures."""
    torch.manual_seed(0)
    modes, width = torch.tensor([[2., 2], [-2, 2], [2, -2], [-2, -2]]), .3

    def teacher(x, t):
        a, s = EPS.alpha(t).flatten(1), EPS.sigma(t).flatten(1)
        var = a ** 2 * width ** 2 + s ** 2
        d = x[:, None] - a[:, None] * modes                                               # (B, 4, 2)
        w = torch.softmax(-d.square().sum(-1) / (2 * var), 1)
        score = -(w[..., None] * d).sum(1) / var
        return (x + s ** 2 * score) / a

    def mlp(inputs):
        return nn.Sequential(nn.Linear(inputs, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    G, fake = mlp(2), mlp(3)
    og, of = torch.optim.Adam(G.parameters(), 1e-3), torch.optim.Adam(fake.parameters(), 2e-3)
    shape = lambda x: x.view(-1, 2, 1, 1)
    predict = lambda x, t: fake(torch.cat([x, t[:, None] / 1000], 1))
    for i in range(1500):
        x0 = G(torch.randn(256, 2))
        for _ in range(3):
            t = torch.randint(0, 1000, (256,))
            eps = torch.randn(256, 2)
            loss = F.mse_loss(predict(EPS.noised(shape(x0.detach()), shape(eps), t).flatten(1), t), eps)
            of.zero_grad(), loss.backward(), of.step()
        if i < 200:
            continue
        tau = EPS.between(torch.rand(256), 20, 980)
        xt = EPS.noised(shape(x0.detach()), shape(torch.randn(256, 2)), tau)
        with torch.no_grad():
            r, f = shape(teacher(xt.flatten(1), tau)), EPS.x0(shape(predict(xt.flatten(1), tau)), xt, tau)
        og.zero_grad(), m.dm_loss(shape(x0), r, f).backward(), og.step()
    x = G(torch.randn(4000, 2)).detach()
    nearest = torch.cdist(x, modes)
    share = torch.bincount(nearest.argmin(1), minlength=4) / len(x)
    assert nearest.min(1).values.median() < .6, f'samples lie {nearest.min(1).values.median():.2f} from the modes'
    assert share.min() > .05, f'modes hold {share.tolist()}'


def test_gan_losses_pull_the_right_way():
    for kind in ('pixel', 'latent'):
        d, g = m.gan_losses(kind)
        real, fake = torch.zeros(4, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
        d(real, fake).backward()
        assert (real.grad < 0).all() and (fake.grad > 0).all()              # down the loss: D(real) up, D(fake) down
        assert (m.slope(g, torch.zeros(4, 2))[1] < 0).all()                 # the generator raises D(fake)
    d, _ = m.gan_losses('pixel')
    assert d(T([3.]), T([-3.])) == 0 and d(T([0.]), T([0.])) == 2


def test_slope_leaves_parameters_alone():
    net, x = nn.Linear(3, 1), torch.randn(5, 3)
    value, slope = m.slope(lambda v: net(v).square().mean(), x)
    assert net.weight.grad is None and slope.shape == x.shape and not value.requires_grad
    assert torch.allclose(slope, 2 * net(x) * net.weight / 5, atol=1e-6)


def test_coupling():
    fake, student = nn.Linear(3, 3), nn.Linear(3, 3)
    w, v = fake.weight.detach().clone(), student.weight.detach().clone()
    m.couple(fake, student, 1.)
    assert torch.equal(fake.weight, w)
    m.couple(fake, student, .97)
    assert torch.allclose(fake.weight, .97 * w + .03 * v) and torch.equal(student.weight, v)


def test_update_drops_a_non_finite_gradient():
    net = nn.Linear(3, 1)
    opt, before = torch.optim.AdamW(net.parameters(), lr=.1), net.weight.detach().clone()
    (net(torch.ones(1, 3)) * float('nan')).sum().backward()
    assert m.update(opt, net) is None and torch.equal(net.weight, before) and net.weight.grad is None and not opt.state
    net(torch.ones(1, 3)).sum().backward()
    assert m.update(opt, net) > 0 and not torch.equal(net.weight, before)


# ------------------------------------------------------------------------------------------------- SAM discriminator

@pytest.fixture(scope='module')
def vit_b(tmp_path_factory):
    """A full-size vit_b checkpoint with random weights, as a file, and the network it came from."""
    from segment_anything import build_sam_vit_b
    torch.manual_seed(0)
    sam = build_sam_vit_b().eval()
    with torch.no_grad():
        for name, w in sam.image_encoder.named_parameters():          # these are zero at initialisation
            if 'rel_pos' in name or 'pos_embed' in name:
                w.normal_(0, .02)
    file = tmp_path_factory.mktemp('sam') / 'sam_vit_b.pth'
    torch.save(sam.state_dict(), file)
    return sam, file


def test_vit_b_at_full_size_is_segment_anythings(vit_b):
    """1024 px: the last global block's features, sent through the encoder's own neck, are the encoder's output."""
    sam, file = vit_b
    encoder, blocks = m.load_sam_encoder(str(file))
    assert blocks == [2, 5, 8, 11] and encoder.img_size == 1024
    disc = m.PixelDiscriminator(encoder, blocks, 1024)
    x = torch.rand(1, 3, 1024, 1024) * 2 - 1
    with torch.no_grad():
        features = disc.features(x)
        assert [tuple(f.shape) for f in features] == [(1, 768, 64, 64)] * 4
        reference = sam.image_encoder(sam.preprocess((x + 1) * 127.5))
        assert torch.allclose(sam.image_encoder.neck(features[-1]), reference, atol=1e-3)
        assert disc(x[..., :256, :256]).shape == (1, 4)                                                # a 256 px crop
        assert [tuple(f.shape) for f in disc.features(x[..., :256, :256])] == [(1, 768, 16, 16)] * 4


@pytest.mark.parametrize('name, blocks', [('vit_l', [5, 11, 17, 23]), ('vit_h', [7, 15, 23, 31])])
def test_other_sams_sizes_are_read_off_the_state(name, blocks):
    import segment_anything
    with torch.device('meta'):
        state = segment_anything.sam_model_registry[name]().state_dict()
        encoder, found = m.build_sam_encoder(state)
    assert found == blocks
    reference = {k[len('image_encoder.'):]: v.shape for k, v in state.items() if k.startswith('image_encoder.')}
    assert {k: v.shape for k, v in encoder.state_dict().items()} == reference


def test_discriminator_is_differentiable_in_the_pixels_and_trains_heads_only():
    from conftest import ROOT
    torch.manual_seed(0)
    disc = m.PixelDiscriminator(*m.load_sam_encoder(str(ROOT / 'assets/toy/sam.pth')), 64)
    x = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    disc(x).mean().backward()
    assert x.grad.abs().sum() > 0
    assert all((w.grad is not None) == ('heads' in k) for k, w in disc.named_parameters())
    checkpointed = m.PixelDiscriminator(disc.encoder, disc.blocks, 64, checkpointing=True)
    checkpointed.heads = disc.heads
    z = x.detach().clone().requires_grad_()
    checkpointed(z).mean().backward()
    assert torch.allclose(x.grad, z.grad, atol=1e-7)


# --------------------------------------------------------------------------------------------- preferences on latents

def test_log_ratio_is_the_gaussians():
    """Against plain log-densities in float64; exactly 0 where student and reference agree."""
    from torch.distributions import Normal
    torch.manual_seed(0)
    x0, ref, z = torch.randn(3, 5, 4, 8, 8).double()
    a, sigma = .53, .85
    expected = (Normal(a * x0, sigma).log_prob(z) - Normal(a * ref, sigma).log_prob(z)).mean((1, 2, 3))
    assert torch.allclose(m.log_ratio(z, x0, ref, a, sigma), expected, rtol=1e-12)
    near = x0.float() + 1e-4 * ref.float()                       # fp32, a policy hardly moved: the difference of squares fails
    expected = (Normal(a * near.double(), sigma).log_prob(z) - Normal(a * x0, sigma).log_prob(z)).mean((1, 2, 3))
    assert torch.allclose(m.log_ratio(z.float(), near, x0.float(), a, sigma).double(), expected, rtol=1e-3)
    assert (m.log_ratio(z, x0, x0, a, sigma) == 0).all()


def test_stage_2s_own_loss_lines():
    """The lines of train_stage2.py themselves: H is the pair's log-ratio, and the gradient is the closed form

        dL/dx0 = -beta sigmoid(-beta H) (alpha / sigma^2) (w - l) / (dimensions x batch)
    """
    import math
    import re
    import textwrap
    source = open(m.__file__.replace('model.py', 'train_stage2.py')).read()
    lines = textwrap.dedent(re.search(r'\n( +H = .*?loss = [^\n]*\n)', source, re.S).group(1))
    torch.manual_seed(0)
    x_ref, w, l = torch.randn(3, 5, 4, 8, 8).double()
    x0 = (x_ref + .1 * torch.randn_like(x_ref)).requires_grad_()
    a, sigma, beta = torch.tensor(.53).double(), torch.tensor(.85).double(), 70.
    sound = torch.tensor([True, True, False, True, True])

    def run(clamp):
        space = dict(x0=x0, x_ref=x_ref, w=w, l=l, a=a, sigma=sigma, sound=sound, F=F, m=m, math=math, torch=torch,
                     args=SimpleNamespace(beta=beta, clamp=clamp))
        exec(lines, space)
        return space['H'], space['loss']

    H, loss = run(0.)
    plain = m.log_ratio(w, x0, x_ref, a, sigma) - m.log_ratio(l, x0, x_ref, a, sigma)
    assert torch.allclose(H, plain, rtol=1e-10)
    gradient, = torch.autograd.grad(loss, x0)
    D = x0[0].numel()
    closed = -beta * torch.sigmoid(-beta * H).view(-1, 1, 1, 1) * a / sigma ** 2 * (w - l) / D / len(x0)
    closed[2] = 0                                                                              # a group with a NaN among its rewards
    assert torch.allclose(gradient, closed, rtol=1e-9)
    wide, narrow = run(.99)[0], run(1e-3)[0]
    assert torch.allclose(wide, plain, rtol=1e-9) and narrow.abs().max() <= math.log(1.001 / .999) + 1e-12


def test_latent_reward_is_lpos_formula(toy):
    """Against a forward pass written out from the UNet's own blocks, with the guidance on the mid feature alone."""
    torch.manual_seed(0)
    reward = m.LatentReward(toy, toy.trainable().eval(), toy.pipe.text_encoder, toy.pipe.text_encoder_2)
    net, z, t = reward.net, torch.randn(3, *toy.latent_shape), torch.tensor([749., 499., 1.])
    y = reward.encode(['a red circle on blue', 'a white ring on black', 'a star'])

    def features(e, pooled):
        sizes = torch.tensor([64., 64, 0, 0, 64, 64]).repeat(3)
        extra = torch.cat([pooled, net.add_time_proj(sizes).view(3, -1)], 1)
        h, emb, out = net.conv_in(z), net.time_embedding(net.time_proj(t)) + net.add_embedding(extra), []
        for block in net.down_blocks:
            for resnet, attention in zip(block.resnets, block.attentions):
                h = attention(resnet(h, emb), encoder_hidden_states=e).sample
            out.append(h.mean((2, 3)))
            for down in block.downsamplers or []:
                h = down(h)
        return out, net.mid_block(h, emb, encoder_hidden_states=e).mean((2, 3))

    with torch.no_grad():
        stages, cond = features(y[0][:3], y[1][:3])
        _, uncond = features(y[0][3:], y[1][3:])
        v = torch.cat(stages + [uncond + 7.5 * (cond - uncond)], 1) @ reward.visual_projection.weight.T
        expected = reward.logit_scale.exp() * F.cosine_similarity(v, y[1][:3])
        assert torch.allclose(reward(z, t, y), expected, rtol=1e-4)
    empty = toy.pipe.encode_prompt([''], device='cpu', do_classifier_free_guidance=False)[0]
    assert torch.allclose(y[0][3:], empty.expand(3, -1, -1)) and empty.abs().sum() > 0


# ------------------------------------------------------------------------------------------------ SDXL's real sizes

def latent_reward_of(base, unet):
    """LatentReward around a UNet of SDXL's size, with text encoders in name only."""
    reward = m.LatentReward.__new__(m.LatentReward)
    base.pipe = SimpleNamespace(components={})
    text = nn.Module()
    text.config = SimpleNamespace(projection_dim=1280)
    reward.__init__(base, unet, text, text)
    return reward.to('meta')


def test_one_iteration_at_sdxl_size_on_meta():
    """Every pass of a stage-1 iteration at 1024 px with SDXL-base's own configuration, without memory: shapes, dtypes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from segment_anything import build_sam_vit_b
    with torch.device('meta'):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, attention_head_dim=[5, 10, 20],
            down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
            up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'), transformer_layers_per_block=[1, 2, 10],
            cross_attention_dim=2048, addition_embed_type='text_time', addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816, use_linear_projection=True)
        vae = AutoencoderKL(sample_size=1024, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                            down_block_types=['DownEncoderBlock2D'] * 4, up_block_types=['UpDecoderBlock2D'] * 4,
                            scaling_factor=.13025)
        disc = m.PixelDiscriminator(*m.build_sam_encoder(build_sam_vit_b().state_dict()), 1024)
    assert sum(w.numel() for w in unet.parameters()) == 2_567_463_684
    base = bare_base()
    base.size, base.vae = 1024, vae.requires_grad_(False)
    base.schedule = m.Schedule(EulerDiscreteScheduler(**BETAS))
    base.uncond = (torch.zeros(1, 77, 2048, device='meta'), torch.zeros(1, 1280, device='meta'))
    y = (torch.zeros(1, 77, 2048, device='meta'), torch.zeros(1, 1280, device='meta'))
    steps, noise = base.schedule.steps(4).to('meta'), torch.empty(1, 9, 4, 128, 128, device='meta')
    with torch.no_grad():
        before = m.backward_simulation(base, unet, steps, noise, y, stop=2)
    x0 = base.x0(unet, *m.at_step(base, steps, noise, 2, before), y)
    assert x0.shape == (1, 4, 128, 128) and x0.dtype == torch.float32 and x0.requires_grad
    with torch.no_grad():
        r = base.x0(unet, x0, steps[1:2], y, 8.)
    _, push = m.slope(lambda x: m.dm_loss(x, r, r), x0)
    _, pull = m.slope(lambda x: -disc(base.decode(x)).mean(), x0)
    torch.autograd.backward([x0, x0], [push, pull])
    assert all(w.grad is not None and w.grad.shape == w.shape for w in unet.parameters())
    m.diffusion_loss(base, unet, x0.detach(), noise[:, 4], steps[:1], y).backward()
    assert base.decode(x0).shape == (1, 3, 1024, 1024) and base.latents(base.decode(x0)).shape == (1, 4, 128, 128)
    assert m.bottleneck(base, unet, x0, steps[:1], y).shape == (1, 1280, 32, 32)
    assert [tuple(f.shape) for f in m.encoder_features(base, unet, x0, steps[:1], y)] == [
        (1, 320, 128, 128), (1, 640, 64, 64), (1, 1280, 32, 32), (1, 1280, 32, 32)]
    reward = latent_reward_of(base, unet)
    assert reward.visual_projection.weight.shape == (1280, 3520)                             # casiatao/LRM's
    two = [torch.cat([a, a]) for a in y]
    assert reward(x0, steps[:1], two).shape == (1,)
    assert m.Head(1280).to('meta')(torch.empty(1, 1280, 32, 32, device='meta')).shape == (1, 1)
