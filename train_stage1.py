"""
Flash-DMD, stage 1 (arXiv 2511.20549, algorithm 1): a many-step teacher becomes a few-step student
G. In one iteration:

    1. high noise      x0 = G(x_s, s) at a step s with SNR < 1, x_s reached as at inference
    2. low noise       z = G(x_l, l) at a step l with SNR >= 1, decoded to pixels
    3. student         L = L_DM + gan_weight L_adv: at x0 the teacher's score against the fake
                       score, eq. 4; at z the discriminator D, heads on a frozen SAM encoder, eq. 9
    4. fake score      diffusion loss on x0, eq. 6, so that it follows the student; before that it
                       is pulled towards the student's weights, eq. 11
    5. discriminator   hinge on real against generated pictures, eq. 8

    python train_stage1.py                              # CUDA: SDXL; else the toy, in 5 minutes
    torchrun --nproc_per_node=8 train_stage1.py         # 8 GPUs, the same result
    python train_stage1.py --recipe sd3                 # SD3-Medium, LoRA
    python train_stage1.py --recipe toy-dmd2            # DMD2, for comparison; toy-dmdr: DMDR

Running the same command again resumes. out/stage1, or out/stage1-RECIPE, gets state-*/
(everything), student/ (a diffusers pipeline, or adapters), log.jsonl, samples-*.png, curves.png.
"""

import argparse
import faulthandler
import math
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import model as m

# --------------------------------------------------------------------------------------------------
# settings: a recipe is a table of defaults, and every flag overrides its entry. The learning rates,
# GAN weight and data of SDXL and SD3 are not in the paper; trials chose student_lr and gan_weight
# of toy and toy-dmd2. What was tried: assets/results.md

# photographs under CC BY, 5.5 GB of them: a set of another model's pictures would teach its look
PHOTOS = dict(
    data='common-canvas/commoncatalog-cc-by', image_column='jpg', text_column='blip2_caption',
    data_files='4/least_dim_range=1024-2048/aspect_ratio_bucket=1-1/*.parquet',
    prompts='assets/prompts.txt', sam='vit_b')
SHAPES = dict(
    data='assets/toy/data', data_files='train.parquet', image_column='image', text_column='text',
    prompts='assets/toy/data/prompts.txt', sam='assets/toy/sam.pth')
TOY = SHAPES | dict(
    batch=16, micro=16, iters=300, warmup=30, cooldown=100, cfg=3., gan_weight=.1, heads_lr=2e-4,
    save_every=100, sample_every=100, log_every=10)
RECIPES = {
    'sdxl': PHOTOS | dict(
        model='stabilityai/stable-diffusion-xl-base-1.0', batch=64, micro=1, iters=1000, cfg=8.,
        gan_weight=1e-2, student_lr=1e-6, fake_lr=1e-6, heads_lr=1e-4, warmup=50,
        grad_checkpointing=True),
    'sd3': PHOTOS | dict(
        model='stabilityai/stable-diffusion-3-medium-diffusers', lora=64, batch=32, micro=1,
        iters=4000, ttur=2, cfg=7., gan_weight=1e-2, student_lr=3e-5, fake_lr=3e-5, heads_lr=1e-4,
        warmup=50, grad_checkpointing=True),
    # rank and rates of LightX2V's 4-step adapters
    'qwen': PHOTOS | dict(
        model='Qwen/Qwen-Image', lora=32, lora_alpha=32., offload=True, batch=32, micro=1,
        iters=1000, ttur=2, cfg=4., gan_weight=1e-2, student_lr=1e-4, fake_lr=2e-5, heads_lr=1e-4,
        warmup=50, grad_checkpointing=True),
    'toy': TOY | dict(model='assets/toy/sdxl', student_lr=5e-5, fake_lr=4e-4, gan_weight=.3),
    'toy-sd3': TOY | dict(model='assets/toy/sd3', lora=32, student_lr=1e-3, fake_lr=2e-3)}
# of Z-Image no rates are published; its pipeline's own guidance_scale is --cfg - 1
RECIPES['zimage'] = RECIPES['qwen'] | dict(model='Tongyi-MAI/Z-Image', cfg=5.)
# DMD2's losses and weights, on a head, learning rate and clip of ours
DMD2 = dict(gan='latent', gan_weight=5e-3, split=False, ttur=5, couple=1.)
RECIPES |= {
    'sdxl-dmd2': RECIPES['sdxl'] | DMD2,
    'toy-dmd2': RECIPES['toy'] | DMD2 | dict(gan_weight=.015)}
# DMDR (2511.13649), its cold start: SD3's column is the official one, SDXL's has ours of 4 steps
DMDR = dict(gan='none', split=False, ttur=5, couple=1., fake_lora=32, dyna=.5, renoise='beta',
            rollout='sde')
RECIPES |= {
    'sdxl-dmdr': RECIPES['sdxl'] | DMDR | dict(
        iters=5000, dyna_iters=1000, student_lr=5e-7, fake_lr=5e-7),
    'sd3-dmdr': RECIPES['sd3'] | DMDR | dict(
        rollout='ode', batch=192, iters=10_000, dyna_iters=2000, student_lr=1e-6, fake_lr=5e-7),
    'toy-dmdr': RECIPES['toy'] | DMDR | dict(
        iters=1000, dyna_iters=200, student_lr=1e-4, fake_lr=2e-3)}
# adapters learn at other rates than whole networks
LORA_RATES = dict(
    sdxl=dict(student_lr=5e-5, fake_lr=5e-5), toy=dict(student_lr=1e-3, fake_lr=2e-3))
WHOLE_RATES = dict.fromkeys(['sd3', 'qwen', 'zimage'], dict(student_lr=1e-6, fake_lr=1e-6))
WHOLE_RATES |= dict(toy=dict(student_lr=1e-4, fake_lr=4e-4))

p = m.parser(__doc__, RECIPES)
flag = p.add_argument_group('what is run').add_argument
flag('--recipe', choices=['', *RECIPES], default='',
     help='table of defaults; empty: sdxl where the cards of this machine hold it, else toy')
flag('--out', help='folder of the run; the same command resumes. Default: out/stage1, or with '
     '--recipe out/stage1-RECIPE')

# -- flags of the distillation ---------------------------------------------------------------------
yes_no = argparse.BooleanOptionalAction
flag = p.add_argument_group('models').add_argument
flag('--model', help='teacher: an SDXL, SD3, Qwen-Image or Z-Image pipeline, folder or hub id')
flag('--base_lora', nargs='+', default=[], metavar=('FILE', 'weight'),
     help='LoRA to merge into the teacher before anything else, at this weight; none: 1')
flag('--t5', action=yes_no, help="SD3's third text encoder; neither: as the pipeline has it")
flag('--offload', action=yes_no, default=False, help='text encoders wait in main memory')
flag('--sam', help='segment_anything checkpoint, or vit_b, vit_l, vit_h (downloaded)')
flag = p.add_argument_group('data').add_argument
flag('--data', help='captioned pictures: hub id, folder, .parquet or webdataset .tar')
flag('--prompts_only', default='',
     help='text file of prompts in the place of --data, a line each: no pictures, --gan none')
flag('--data_files', help='which files of --data, a pattern; empty: all')
flag('--data_limit', type=int, default=0, help='only the first so many rows of --data; 0: all')
flag('--image_column', help='column of the pictures; empty: the one there is')
flag('--text_column', help='column of the captions (a.b: nested); empty: by the usual names')
flag('--prompts', help='text file; its first 8 lines are drawn in the sample grids')
flag('--workers', type=int, default=2, help='threads per rank that read pictures; 0: the main one')
flag = p.add_argument_group('method').add_argument
flag('--steps', type=int, default=4, help="the student's sampling steps")
flag('--cfg', type=float, help="guidance w of the teacher's score, uncond + w (cond - uncond)")
flag('--gan', choices=['pixel', 'latent', 'none'], default='pixel',
     help="pixel: SAM on decoded pictures; latent: DMD2's, on the fake score's bottleneck")
flag('--gan_weight', type=float, help="weight of the student's adversarial loss")
flag('--gan_crop', type=int, default=0, help='pixels a side of a crop for the GAN; 0: all')
flag('--split', action=yes_no, default=True, help='DM at high, GAN at low noise; no: both always')
flag('--ttur', type=int, default=1, help='updates of fake score and D for one of the student')
flag('--couple', type=float, default=.97, help='c in fake <- c fake + (1 - c) student; 1: off')
flag('--lora', type=int, default=0, help='rank of adapters on the teacher; 0: train all weights')
flag('--lora_alpha', type=float, default=0., help='adapters are scaled by this / rank; 0: 2 x rank')
flag('--lora_targets', default='attention', help="ends of module names, with commas")
flag('--fake_lora', type=int, default=0,
     help="DMDR: rank of the fake score's adapters on the teacher, scale 2; 0: as the student")
flag('--dyna', type=float, default=0., help="DMDR: their scale in the real score at first; 0: off")
flag('--dyna_iters', type=int, default=0, help='student updates until that is 0, beta uniform')
flag('--renoise', choices=['uniform', 'beta'], default='uniform',
     help="noise levels of DM; beta: DMDR's, of the fake score's loss as well")
flag('--rollout', choices=['sampler', 'sde', 'ode'], default='sampler',
     help="the student's input: as at inference; DMDR's: its x0 there (sde) or last (ode), noised")
flag = p.add_argument_group('optimisation').add_argument
flag('--iters', type=int, help='iterations')
flag('--batch', type=int, help='prompts per iteration, over all ranks')
flag('--micro', type=int, help='prompts per forward on one rank; gradients accumulate')
flag('--student_lr', type=float, help='AdamW learning rate of the student')
flag('--fake_lr', type=float, help='AdamW learning rate of the fake score')
flag('--heads_lr', type=float, help='AdamW learning rate of the discriminator heads')
flag('--warmup', type=int, default=0, help='iterations of linear learning-rate warm-up')
flag('--cooldown', type=int, default=0, help='last iterations, in which they fall linearly to 0')
flag('--grad_checkpointing', action=yes_no, default=False, help='gradient checkpointing everywhere')
flag('--cpu_offload', action=yes_no, default=False,
     help='weights that are trained and their moments wait in main memory; without --lora')
flag('--compile', action=yes_no, default=False, help='torch.compile for all but text encoders')
flag('--seed', type=int, default=0, help='seed of the run')
flag = p.add_argument_group('the run: saves, pictures, log').add_argument
flag('--save_every', type=int, default=250, help='iterations between saves')
flag('--save_dtype', choices=['float16', 'bfloat16', 'float32'], default='float16',
     help="of student/'s weights")
flag('--sample_every', type=int, default=250, help='iterations between sample grids; 0: none')
flag('--log_every', type=int, default=1, help='iterations between log lines')
flag('--timeout', type=float, default=30., help='minutes that an iteration may take at most')
flag('--disk_full', choices=['stop', 'skip'], default='stop', help='if a save finds no room')
flag('--force', action=yes_no, default=False, help='begin although the plan does not fit')
flag('--check', action=yes_no, default=False,
     help='the plan, one iteration and one save in OUT-check, what they took; nothing is kept')
flag('--wandb', default='', help='Weights & Biases project to log to as well; empty: none')
# --------------------------------------------------------------------------------------------------

given = p.parse_known_args()[0].recipe
recipe = given or m.default_recipe(p, RECIPES)
p.set_defaults(**RECIPES[recipe], out=m.default_out(1, given))
m.give_way(p, 'data', 'data_files', 'image_column', 'text_column')
chosen = p.parse_known_args()[0]
# defaults that belong to what was chosen instead of the recipe's; like all they are printed below
if chosen.prompts_only:
    p.set_defaults(gan='none')
if p.parse_known_args()[0].gan != p.get_default('gan'):            # of another kind: its own weight
    family = RECIPES.get(recipe.split('-')[0], RECIPES[recipe])
    p.set_defaults(gan_weight=(DMD2 if chosen.gan == 'latent' else family)['gan_weight'])
if chosen.lora and not RECIPES[recipe].get('lora'):
    p.set_defaults(**LORA_RATES.get(recipe.split('-')[0], {}))
if RECIPES[recipe].get('lora') and not chosen.lora:
    p.set_defaults(**WHOLE_RATES.get(recipe.split('-')[0], {}))
args = p.parse_args()
args.recipe = recipe
if args.check:
    args.out, args.iters, args.log_every = args.out.rstrip('/') + '-check', 1, 1

# -- ranks, device, folder -------------------------------------------------------------------------
m.at_least(args, batch=1, micro=1, iters=1, steps=1, ttur=1, save_every=1, log_every=1, workers=0,
           sample_every=0, warmup=0, cooldown=0, seed=0, gan_crop=0, couple=0, lora=0, lora_alpha=0,
           data_limit=0, timeout=.05, student_lr=0, fake_lr=0, heads_lr=0, gan_weight=0, cfg=0,
           fake_lora=0, dyna=0, dyna_iters=0)
m.at_most(args, couple=1, steps=1000, seed=2 ** 63 - 1, timeout=1e6)
if args.dyna and not args.fake_lora:
    m.die(f'--dyna {args.dyna} scales adapters of the fake score; give --fake_lora 32 as well')
if args.fake_lora and args.couple < 1:
    m.die(f'--couple {args.couple}: adapters of --fake_lora are not coupled; give --couple 1')
rank, world, device = m.launch(args.timeout + 5)
m.print0(f'recipe {recipe}: {args.model} -> {args.out}, {world} x {device.type}')
if args.cpu_offload and args.lora:
    m.die('--cpu_offload is for networks trained whole: leave it away, or --lora')
args.micro = min(args.micro, max(1, args.batch // world))
if args.batch % (world * args.micro):
    m.die(f'--batch {args.batch} is not a multiple of {world} ranks x --micro {args.micro}; change '
          'one of them')
mine = range(rank * args.batch // world, (rank + 1) * args.batch // world)  # samples of this rank
n = len(mine) // args.micro                                                 # their micro-batches
prompts = m.read_prompts(args.prompts)[:8]
out = m.writable_folder(args.out, '--out')
lock = m.hold(out)                                          # while this process lives
if args.check:
    m.clear_check(out)
state = m.find_state(out, args)
start = m.iteration_of(state)
planned = m.plan(args, out, device)
m.check_sources(args)

# -- data ------------------------------------------------------------------------------------------
if args.prompts_only:
    pictures = m.Prompts(args.prompts_only, args.seed)
else:
    pictures = m.Pictures(                                  # the model tells their size, now 0
        args.data, args.data_files, args.image_column, args.text_column, 0, args.seed,
        limit=args.data_limit)
m.print0(pictures.said)

# -- networks --------------------------------------------------------------------------------------
# base.teacher, frozen; student and fake score, copies of it; the discriminator's heads
began = time.time()
dtype = torch.bfloat16 if device.type == 'cuda' else torch.float32        # of what is frozen
base = m.load_base(args.model, device, dtype, args.t5, args.offload, args.base_lora)
schedule = base.schedule
pictures.size = base.size
alpha = args.lora_alpha or 2. * args.lora
lora = m.lora_config(base.teacher, args.lora, alpha, args.lora_targets)
torch.manual_seed(args.seed)             # of new heads and adapters; all else comes from m.draw
lora_f = m.lora_config(
    base.teacher, args.fake_lora, 2. * args.fake_lora, args.lora_targets, '--fake_lora')
nets = dict(student=base.trainable(lora), fake=base.trainable(lora_f or lora))
# adapters begin at random, but at one place: the coupling mixes them
if not lora_f:
    m.load_trained(nets['fake'], m.trained(nets['student']))
gan = args.gan != 'none'
if args.gan == 'pixel':
    sam = m.load_sam_encoder(args.sam)
    nets['heads'] = m.PixelDiscriminator(sam, base.size, args.grad_checkpointing)
elif args.gan == 'latent':
    *_, bottleneck = base.channels(base.teacher)
    nets['heads'] = m.Head(bottleneck)
if args.grad_checkpointing:
    for net in (nets['student'], nets['fake'], base.vae):
        net.enable_gradient_checkpointing()
# as the loop calls them. Networks that are trained whole are sharded over the ranks, and the
# teacher with them (FSDP2); adapters and heads are whole on each, gradients averaged (DDP), and
# so is a teacher with adapters on it
how = dict(shard=not lora and (world > 1 or args.cpu_offload), cpu_offload=args.cpu_offload,
           compiled=args.compile)
student = m.parallel(nets['student'], device, **how)
heads = m.parallel(nets.get('heads'), device, compiled=args.compile)
how['shard'] = how['shard'] and not lora_f
fake = m.parallel(nets['fake'], device, **how)
m.parallel(base.teacher, device, **how)
if args.compile:
    base.vae.decoder.compile(fullgraph=True, dynamic=False)
weights = {name: m.trained(net) for name, net in nets.items()}
rates = dict(student=args.student_lr, fake=args.fake_lr, heads=args.heads_lr)
opts = {}
for name, named in weights.items():
    opts[name] = torch.optim.AdamW(
        named.values(), lr=rates[name], betas=(.9, .999), weight_decay=.01, fused=True)
count = sum(w.numel() for w in weights['student'].values()) / 1e6
m.print0(f'networks: {count:.3g} M trained parameters in the student, {time.time() - began:.1f} s')
# --------------------------------------------------------------------------------------------------

m.load_state(state, weights, opts)

# -- split -----------------------------------------------------------------------------------------
# the student's steps, by SNR: SDXL 999, 749, 499 | 249, SD3 1000, 900, 750 | 500
S = args.steps
steps = schedule.steps(S).to(device)
low = [k for k in range(S) if schedule.low_noise(steps[k:k + 1])]
high = [k for k in range(S) if k not in low]
if args.split and not (low and high):
    m.die(f'--steps {S} gives {steps.long().tolist()}, all on one side of SNR 1; use --no-split or '
          'more steps')
scale = base.pipe.vae_scale_factor
if args.gan_crop % scale or args.gan_crop > base.size:
    m.die(f'--gan_crop {args.gan_crop} must be a multiple of {scale} up to {base.size}, or 0')

# -- pictures to look at ---------------------------------------------------------------------------
grid_noise, _ = m.draw(args.seed, 0, range(len(prompts)), (S, *base.latent_shape))
grid_noise = grid_noise.to(device)
# --------------------------------------------------------------------------------------------------

loader = pictures.batches(mine, args.batch, range(start, args.iters), args.workers)
if rank == 0:
    print(f'steps {steps.long().tolist()}, batch {args.batch} = {world} ranks x {n} x {args.micro}')
    shown = ('cfg gan gan_weight split ttur couple lora student_lr fake_lr heads_lr fake_lora dyna '
             'dyna_iters renoise rollout').split()
    print(' '.join(f'--{name} {vars(args)[name]}' for name in shown))
if args.sample_every:
    with torch.compiler.set_stance('force_eager'):
        teacher_row = base.teacher_samples(prompts, grid_noise[:, 0], 50, args.cfg, args.micro)

# -- pieces of an iteration ------------------------------------------------------------------------

def micro_batches(it, rows):
    """This rank's micro-batches of iteration it: prompts y, real pictures, and by its name every
    random number that an iteration needs, eps_ (b, C, h, w) and times t (b,)."""
    count = S + 5 + (args.rollout != 'sampler')
    eps, u = m.draw(args.seed, it, mine, (count, *base.latent_shape))
    y = base.encode(rows['text'])
    for k in range(0, len(mine), args.micro):
        j = slice(k, k + args.micro)
        normals = eps[j].to(device)
        u_tau, u_adv, u_fake, u_D = u[j].to(device).unbind(1)
        b = SimpleNamespace(
            text=rows['text'][j], y=[v[j] for v in y], real=rows['pixels'][j].to(device))
        b.eps_steps = normals[:, :S]                   # (b, S, C, h, w), of the student's own steps
        b.eps_tau, b.eps_low, b.eps_made, b.eps_fake, b.eps_real = normals[:, S:S + 5].unbind(1)
        b.eps_s = normals[:, -1]                       # of --rollout sde and ode
        b.tau = schedule.between(u_tau, 20, 980)       # of the DM loss
        b.t_fake = schedule.training(u_fake)           # of the fake score's own loss
        if args.renoise == 'beta':                     # DynaRS: from Beta(4, 1.5) to uniform
            c = fading(it)
            b.tau, b.t_fake = (schedule.beta(v, 1 + 3 * c, 1 + .5 * c) for v in (u_tau, u_fake))
        b.t_adv = schedule.between(u_adv, 0, 999)      # of the latent GAN
        b.t_D = schedule.between(u_D, 0, 999)
        yield b

def fading(it):
    """What is left, 1 to 0 by half a cosine of --dyna_iters student updates, of DMDR's two aids."""
    share = min(1., it // args.ttur / args.dyna_iters) if args.dyna_iters else 1.
    return .5 * (1 + math.cos(math.pi * share))

def pick(pool, it, key):
    """One of pool, the same on every rank."""
    stream = m.generator(args.seed, it, 2 ** 31 + key)
    place = torch.randint(len(pool), (1,), generator=stream)
    return pool[place.item()]

def crop(x, it):
    """The random square of --gan_crop of iteration it, of latents or of pixels (b, C, H, W)."""
    whole = base.latent_shape[-1]
    side = (args.gan_crop or base.size) // scale
    stream = m.generator(args.seed, it, 2 ** 31)
    unit = x.shape[-1] // whole
    top, left = unit * torch.randint(whole - side + 1, (2,), generator=stream)
    return x[..., top:top + unit * side, left:left + unit * side]

def seen(z, it):
    """What D sees of latents z: pixels, or with --gan latent themselves."""
    with base.autocast():
        return base.decode(crop(z, it)) if args.gan == 'pixel' else z

def D(net, x, eps, t, y):
    """Logits (b, 1) or (b, heads) of pixels; with --gan latent of latents, noised to t, through the
    first half of the fake score."""
    if args.gan == 'latent':
        x_t = schedule.noised(x, eps, t)
        return net(base.features(nets['fake'], x_t, t, y)[-1])
    with base.autocast():
        return net(x).float()

def norm(d):
    """Mean L2 norm of a sample's gradient; d (b, ...) is that of a mean over the batch."""
    return d.flatten(1).norm(dim=1).mean() * len(d)

def warmed(it):
    """Share of the learning rates: linear warm-up and cool-down."""
    up = (it + 1) / max(1, args.warmup)
    down = (args.iters - it) / max(1, args.cooldown)
    return min(1., up, down)

# --------------------------------------------------------------------------------------------------

told = m.hear()                      # Ctrl-C or SIGTERM: the iteration is finished, then a save
log = m.Log(out, start, device, args)
for it in range(start, args.iters + 1):
    # a hung rank ends by itself, with the line at which it stands
    faulthandler.dump_traceback_later(60 * args.timeout, exit=True)
    # all ranks leave after the same iteration, whichever was told to
    stop = any(m.gathered(bool(told))) or it == args.iters
    if args.sample_every and (it % args.sample_every == 0 or it == args.iters):
        with torch.compiler.set_stance('force_eager'):        # compiled graphs are of whole --micro
            row = m.student_pictures(base, student, steps, prompts, grid_noise, args.micro)
        if rank == 0:
            m.picture_grid([teacher_row, row], prompts, out / f'samples-{it:07d}.png',
                           ['teacher: ', 'student: '])
    if it > start and (it % args.save_every == 0 or stop):
        # stage 2 and evaluate.py have this recipe as well, but no -dmd2 or -dmdr of it
        facts = dict(base_model=m.settings(args)['model'], recipe=recipe.split('-dm')[0],
                     iteration=it, cfg=args.cfg, t5=args.t5, prompts=prompts)
        m.save_state(out, it, args, weights, opts, stop, lambda: m.save_student(
            out / 'student', base, nets['student'], steps, args.save_dtype, facts, lora))
    if stop:
        break

    for name, opt in opts.items():
        for group in opt.param_groups:
            group['lr'] = rates[name] * warmed(it)
    learns = it % args.ttur == 0                                  # the student, in this iteration

    # -- one distillation: losses ------------------------------------------------------------------
    rows = next(loader)
    log.data.update(rows['trouble'], cut=base.cut(rows['text']))
    batches = list(micro_batches(it, rows))                  # both halves below go through them
    # one step for the whole batch: shorter simulations end together, on every rank
    s = pick(high if args.split else range(S), it, 1)
    l = pick(low, it, 2) if args.split else s
    # the real score is the teacher, in DynaDG with the fake score's adapters at a falling scale
    s_r = args.dyna * fading(it)
    real_score = fake if s_r else base.teacher
    norms = []
    for b in batches:
        with torch.set_grad_enabled(learns):
            # 1. high noise: the student's sample at its step s. The fake score learns b.x0: the
            # same, or what DMDR's rollout gives
            if args.rollout == 'sampler':
                x_s, t_s = m.reach(base, student, steps, b.eps_steps, b.y, s)
            else:
                x_s, t_s, b.x0 = m.reach_dmdr(
                    base, student, steps, b.eps_steps, b.y, s, args.rollout, b.eps_s)
                if not (learns or gan):
                    continue
            x0 = base.x0(student, x_s, t_s, b.y)                                    # (b, C, h, w)
            if args.rollout == 'sampler':
                b.x0 = x0.detach()

            # 2. low noise: finished without gradient, noised to step l, cleaned once with gradient
            z = x0
            if gan and args.split:
                end = m.backward_simulation(
                    base, student, steps, b.eps_steps, b.y, first=s + 1, x0=x0.detach())
                t_l = steps[l].expand(len(end))
                x_l = schedule.noised(end, b.eps_low, t_l)
                z = base.x0(student, x_l, t_l, b.y)                                 # (b, C, h, w)

            # 3. losses are functions of x and v, so that D and the fake score, through which they
            # go, get no gradient; a term of x0 or z would be lost
            x = x0.detach().requires_grad_(learns)
            v = z.detach().requires_grad_(learns)
            made = seen(v, it) if gan else v
            b.made = made.detach()
            if not learns:
                continue                                       # samples are all that is wanted

            # distribution matching, eq. 4: g = (f - r) / mean|x0 - r| is the slope of L_DM at x0
            with torch.no_grad():
                x_tau = schedule.noised(x, b.eps_tau, b.tau)
                with m.adapters_at(real_score, s_r):
                    r = base.x0(real_score, x_tau, b.tau, b.y, args.cfg)
                f = base.x0(fake, x_tau, b.tau, b.y)
                g = (f - r) / (x - r).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
            L_DM = .5 * F.mse_loss(x, (x - g).detach())

            # adversarial, eq. 9; the latent GAN has DMD2's softplus
            L_adv = torch.zeros((), device=device)
            if gan:
                logits = D(heads, made, b.eps_made, b.t_adv, b.y)
                L_adv = -logits.mean() if args.gan == 'pixel' else F.softplus(-logits).mean()

            L = L_DM + args.gan_weight * L_adv
            d_x, d_v = torch.autograd.grad(L, [x, v], materialize_grads=True)
        log(f'dm/{int(steps[s])}', L_DM)
        log('grad/dm', norm(d_x))
        if gan:
            log('gan/g', L_adv)
            log('grad/gan', norm(d_v))
        if gan and not args.split:                       # of one sample: do they pull one way?
            cosine = F.cosine_similarity(d_x.flatten(1), d_v.flatten(1))
            log(f'grad/cos/{int(steps[s])}', cosine.mean())
        # -- one distillation: the student ---------------------------------------------------------
        torch.autograd.backward([x0, z], [d_x / n, d_v / n])

    if learns:
        norms.append(m.update(opts['student'], nets['student']))
    if learns and norms[0] is not None:
        log('norm/student', norms[0])
        # coupling, eq. 11: psi <- c psi + (1 - c) theta
        with torch.no_grad():
            for name, psi in weights['fake'].items() if args.couple < 1 else ():
                psi.lerp_(weights['student'][name], 1 - args.couple)

    # -- one distillation: fake score and discriminator --------------------------------------------
    for b in batches:
        # 4. the fake score learns the student's samples, eq. 6
        x_t = schedule.noised(b.x0, b.eps_fake, b.t_fake)
        target = schedule.target(b.x0, b.eps_fake, b.t_fake)
        L = F.mse_loss(base.predict(fake, x_t, b.t_fake, b.y), target)
        log('fake', L)

        # 5. the discriminator tells real from generated, eq. 8
        if gan:
            real = crop(b.real, it) if args.gan == 'pixel' else base.latents(b.real)
            eps = torch.cat([b.eps_real, b.eps_made])
            y = [torch.cat([v, v]) for v in b.y]
            logits = D(heads, torch.cat([real, b.made]), eps, b.t_D.repeat(2), y)
            at_real, at_made = logits.chunk(2)
            if args.gan == 'pixel':
                L_D = F.relu(1 - at_real).mean() + F.relu(1 + at_made).mean()
                L = L + L_D
            else:                    # DMD2's D is the fake score's own half: it gets a small weight
                L_D = F.softplus(-at_real).mean() + F.softplus(at_made).mean()
                L = L + 1e-2 * L_D
            log('gan/d', L_D)
            log('gan/real', at_real.mean())
            log('gan/made', at_made.mean())
        (L / n).backward()                             # gradients add up over micro-batches
    # None where a gradient was not finite and the update was dropped, on all ranks alike
    norms += [m.update(opts[name], nets[name]) for name in nets if name != 'student']
    # ----------------------------------------------------------------------------------------------

    log.count(it, norms)
    log.write(it + 1)

# -- the end ---------------------------------------------------------------------------------------
faulthandler.cancel_dump_traceback_later()
trouble = log.trouble()
most = max(m.gathered(m.peak(device)))
if rank == 0 and it < args.iters:
    where = f'saved in {out}: the same command goes on from there' if it else 'before any save'
    print(f'told to stop after iteration {it}, {where}')
elif rank == 0 and args.check:
    m.remove(out)
    print(f'checked in {(time.time() - began) / 60:.1f} minutes: at most {most:.1f} GB on a rank, '
          f'{planned:.1f} planned; {out} is removed')
elif rank == 0:
    m.curves(out / 'log.jsonl', out / 'curves.png')
    print(f'done: {out / "student"} after {it} iterations, {(time.time() - began) / 60:.1f} '
          f'minutes, {log.dropped} iterations with a dropped update; pictures passed over '
          f'and captions cut: {trouble or "none"}; python sample.py --ckpt {out}')
m.leave()
