"""
Flash-DMD, stage 2 (arXiv 2511.20549, eq. 12-13): the distillation of stage 1 goes on, in the same
lines, and after each of its iterations come --rl_ratio preference updates of the student on noisy
latents. One preference update:

    z_s          the student's input at a high-noise step s, by backward simulation; x0 = G(z_s)
    candidates   z_k = alpha' x0 + sigma' eps_k, k = 1..K: the sampler's own next states, at step s'
    pair         a reward scores each at its own noise level; best = winner w, worst = loser l. A
                 latent reward model reads the noisy latents; a reward of pictures (--reward
                 pickscore...) what the student makes of them in one step, decoded
    loss         -log sigmoid(beta (log p(w) / p_ref(w) - log p(l) / p_ref(l))), p the Gaussian
                 N(alpha' x0, sigma'^2) of that step, p_ref that of the student as stage 2 found it

    python train_stage2.py                          # from out/stage1, else from the shipped student
    torchrun --nproc_per_node=8 train_stage2.py     # 8 GPUs, the same result
    python train_stage2.py --no-joint --gan none --out out/rl_alone     # alone it over-optimises

Running the same command again resumes. out/stage2 gets what stage 1's folder has, and eval.jsonl.
"""

import argparse
import faulthandler
import json
import math
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import model as m
import rewards as R

# --------------------------------------------------------------------------------------------------
# settings: the recipe's, over them what stage 1 was told (args.json), over them the command line.
# Learning rates, beta and weights are not in the paper. What was tried: assets/results.md

# photographs under CC BY, 5.5 GB of them: a set of another model's pictures would teach its look
PHOTOS = dict(
    data='common-canvas/commoncatalog-cc-by', image_column='jpg', text_column='blip2_caption',
    data_files='4/least_dim_range=1024-2048/aspect_ratio_bucket=1-1/*.parquet',
    prompts='assets/prompts.txt', sam='vit_b')
SHAPES = dict(
    data='assets/toy/data', data_files='train.parquet', image_column='image', text_column='text',
    prompts='assets/toy/data/prompts.txt', sam='assets/toy/sam.pth', judge='assets/toy/clip',
    pickscore='assets/toy/pickscore', real='assets/toy/data', real_files='test.parquet')
RECIPES = {
    'sdxl': PHOTOS | dict(
        lrm='casiatao/LRM/lrm_sdxl', cfg=8., gan_weight=1e-2, batch=64, micro=1, iters=2000,
        student_lr=1e-6, fake_lr=1e-6, heads_lr=1e-4, rl_lr=1e-6, warmup=50, critic_warmup=100,
        grad_checkpointing=True, log_every=6),
    'toy': SHAPES | dict(
        lrm='assets/toy/lrm', cfg=3., gan_weight=.1, batch=16, micro=16, iters=330,
        student_lr=2e-5, fake_lr=1e-4, heads_lr=2e-4, rl_lr=1e-5, warmup=30, critic_warmup=30,
        save_every=110, sample_every=110, eval_every=110, log_every=6)}
# SD3 has no public latent reward, and its first two steps lead to t = 900 and 750, where SNR is
# .012 and .11 and a preference hardly moves anything: so the third counts as well
SD3 = dict(reward='pickscore', lrm='', rl_steps='all', beta=100.)
RECIPES['sd3'] = RECIPES['sdxl'] | SD3 | dict(
    cfg=7., batch=32, ttur=2, student_lr=3e-5, fake_lr=3e-5, rl_lr=1e-5)
RECIPES['toy-sd3'] = RECIPES['toy'] | SD3 | dict(
    iters=240, cooldown=60, student_lr=1e-4, fake_lr=5e-4, rl_lr=1e-4, save_every=120,
    sample_every=120, eval_every=120)
# adapters learn at other rates than whole networks
LORA_RATES = dict(
    sdxl=dict(student_lr=5e-5, fake_lr=5e-5, rl_lr=1e-5),
    toy=dict(student_lr=2e-4, fake_lr=5e-4, rl_lr=1e-4))
# what stage 1 hands on, if its args.json lies beside the student
HANDED = ('offload sam data data_files image_column text_column data_limit prompts workers cfg '
          'gan gan_weight gan_crop split ttur couple batch micro heads_lr grad_checkpointing '
          'save_dtype').split()

p = m.parser(__doc__, RECIPES)
flag = p.add_argument_group('what is run').add_argument
flag('--recipe', choices=['', *RECIPES], default='', help="table of defaults; empty: the student's")
flag('--init', default='',
     help='run of stage 1, or a student; empty: out/stage1 (-RECIPE), else the shipped one')
flag('--out', help='folder of the run; the same command resumes. Default: out/stage2, or with '
     '--recipe out/stage2-RECIPE')

# -- flags of the distillation ---------------------------------------------------------------------
yes_no = argparse.BooleanOptionalAction
flag = p.add_argument_group('models').add_argument
flag('--model', help='teacher: an SDXL or SD3 pipeline, folder or hub id')
flag('--t5', action=yes_no, help="SD3's third text encoder; neither: as the pipeline has it")
flag('--offload', action=yes_no, default=False, help='text encoders wait in main memory')
flag('--sam', help='segment_anything checkpoint, or vit_b, vit_l, vit_h (downloaded)')
flag = p.add_argument_group('data').add_argument
flag('--data', help='captioned pictures: hub id, folder, .parquet or webdataset .tar')
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
# -- flags of the preference updates ---------------------------------------------------------------
flag = p.add_argument_group('preference updates').add_argument
flag('--reward', choices=['latent', *R.SCORES], default='latent',
     help='latent: --lrm; else a reward of pictures, its weights as in evaluate.py, or --pickscore')
flag('--lrm', help='latent reward model in the layout of casiatao/LRM: folder or hub id/subfolder')
flag('--joint', action=yes_no, default=True, help='distil as well; no: preference updates only')
flag('--rl_ratio', type=int, default=5, help='preference updates after each distillation iteration')
flag('--rl_steps', choices=['high', 'all'], default='high',
     help='steps s that get them: those that lead to a high-noise step, or all but the last')
flag('--rl_lr', type=float, help="the student's learning rate in preference updates")
flag('--rl_prompts', default='', help='text file of their prompts; empty: the captions of --data')
flag('--candidates', type=int, default=4, help='K, next states drawn from each z_s')
flag('--beta', type=float, default=500., help='sharpness; log p are means over dimensions')
flag('--clamp', type=float, default=0., help='keep p / p_ref within 1 -+ this, as LPO does; 0: off')
flag('--critic_warmup', type=int, default=0, help='first iterations for fake score and D, if new')
flag = p.add_argument_group('evaluations').add_argument
flag('--eval_every', type=int, default=250, help='iterations between evaluations; 0: none')
flag('--eval_n', type=int, default=128, help='of --prompts, how many are evaluated')
flag('--judge', default=R.CLIP_L, help='CLIP for their R-precision and CMMD')
flag('--pickscore', default=R.PickScore.home, help='preference model on pixels')
flag('--real', default='', help='real pictures for CMMD, as --data; empty: --data itself')
flag('--real_files', default='', help='which files of --real')
# --------------------------------------------------------------------------------------------------

chosen = p.parse_known_args()[0]
folder, origin = m.find_student(chosen.init, '--init', m.default_out(1, chosen.recipe))
recipe = chosen.recipe or origin['recipe']
if recipe not in RECIPES:
    m.die(f'--init {folder}: its recipe is {recipe!r}; give --recipe {" or ".join(RECIPES)}')
if not chosen.init and recipe != origin['recipe']:
    m.die(f'--recipe {recipe}: the newest student, {folder}, is of recipe {origin["recipe"]}; run '
          f'train_stage1.py --recipe {recipe} first, or give --init')
adapters = origin.get('lora') or dict(rank=0, alpha=0., targets=['attention'])
file = folder.parent / 'args.json'
with m.sentence(f'--init: {file} is damaged; choose another --init'):
    handed = json.loads(file.read_text()) if file.exists() else {}
    handed = {name: handed[name] for name in HANDED if name in handed}
    odd = [name for name, value in handed.items() if isinstance(value, (list, dict))]
    assert not odd, f'{odd} cannot be'
p.set_defaults(**RECIPES[recipe], out=m.default_out(2, chosen.recipe))
if adapters['rank']:
    p.set_defaults(**LORA_RATES.get(recipe, {}))
p.set_defaults(
    **handed, model=origin['base_model'], steps=len(origin['steps']), t5=origin.get('t5'),
    lora=adapters['rank'], lora_alpha=adapters['alpha'], lora_targets=','.join(adapters['targets']))
if p.get_default('data') != RECIPES[recipe]['data']:
    p.set_defaults(real='', real_files='')
m.give_way(p, 'data', 'data_files', 'image_column', 'text_column', 'real', 'real_files')
m.give_way(p, 'real', 'real_files')
args = p.parse_args()
args.recipe, args.init = recipe, str(folder)
if args.check:                               # a distillation and a preference update
    args.out, args.iters, args.log_every = f'{args.out}-check', 2, 1
    args.critic_warmup = 0
m.at_least(args, rl_ratio=1, candidates=2, critic_warmup=0, eval_every=0, eval_n=1, clamp=0, beta=0,
           rl_lr=0)
if args.clamp >= 1:
    m.die(f'--clamp {args.clamp} must be below 1')
rl_prompts = m.read_prompts(args.rl_prompts, '--rl_prompts') if args.rl_prompts else None
if args.lora != adapters['rank']:
    m.die(f'--lora {args.lora}: the student in {folder} is one of --lora {adapters["rank"]} and '
          'stays one; leave --lora away')

# -- ranks, device, folder -------------------------------------------------------------------------
m.at_least(args, batch=1, micro=1, iters=1, steps=1, ttur=1, save_every=1, log_every=1, workers=0,
           sample_every=0, warmup=0, cooldown=0, seed=0, gan_crop=0, couple=0, lora=0, lora_alpha=0,
           data_limit=0, timeout=.05, student_lr=0, fake_lr=0, heads_lr=0, gan_weight=0, cfg=0)
m.at_most(args, couple=1, steps=1000, seed=2 ** 63 - 1)
rank, world, device = m.launch(args.timeout + 5)
if rank == 0:
    print(f'recipe {recipe}: {args.model} -> {args.out}, {world} x {device.type}', flush=True)
if args.cpu_offload and args.lora:
    m.die('--cpu_offload is for networks trained whole: leave it away, or --lora')
args.micro = min(args.micro, max(1, args.batch // world))
if args.batch % (world * args.micro):
    m.die(f'--batch {args.batch} is not a multiple of {world} ranks x --micro {args.micro}; change '
          'one of them')
mine = range(rank * args.batch // world, (rank + 1) * args.batch // world)  # samples of this rank
n = len(mine) // args.micro                                                 # their micro-batches
prompts = m.read_prompts(args.prompts)[:8]
m.check_sources(args)                                       # what is to be fetched, and wandb
out = m.writable_folder(args.out, '--out')
lock = m.hold(out)                                          # while this process lives
for left in out.glob('[!.]*') if args.check and rank == 0 else ():
    m.remove(left)
state = m.find_state(out, args)
start = m.iteration_of(state)
planned = m.plan(args, out, device)

# -- data ------------------------------------------------------------------------------------------
pictures = m.Pictures(                                      # of a size that the model will tell
    args.data, args.data_files, args.image_column, args.text_column, 0, args.seed,
    limit=args.data_limit)
if rank == 0:
    print(pictures.said, flush=True)

# -- networks --------------------------------------------------------------------------------------
# base.teacher, frozen; student and fake score, copies of it; the discriminator's heads
began = time.time()
dtype = torch.bfloat16 if device.type == 'cuda' else torch.float32        # of what is frozen
base = m.load_base(args.model, device, dtype, args.t5, args.offload)
schedule = base.schedule
pictures.size = base.size
alpha = args.lora_alpha or 2. * args.lora
lora = m.lora_config(base.teacher, args.lora, alpha, args.lora_targets)
torch.manual_seed(args.seed)             # of new heads and adapters; all else comes from m.draw
nets = dict(student=base.trainable(lora), fake=base.trainable(lora))
# adapters begin at random, but at one place: the coupling mixes them
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
# teacher with them (FSDP2); adapters and heads are whole on each, gradients averaged (DDP)
how = dict(shard=not lora and (world > 1 or args.cpu_offload), cpu_offload=args.cpu_offload,
           compiled=args.compile)
student = m.parallel(nets['student'], device, **how)
fake = m.parallel(nets['fake'], device, **how)
heads = m.parallel(nets.get('heads'), device, compiled=args.compile)
m.parallel(base.teacher, device, **how)
if args.compile:
    base.vae.decoder.compile(fullgraph=True, dynamic=False)
weights = {name: m.trained(net) for name, net in nets.items()}
rates = dict(student=args.student_lr, fake=args.fake_lr, heads=args.heads_lr)
opts = {}
for name, named in weights.items():
    opts[name] = torch.optim.AdamW(
        named.values(), lr=rates[name], betas=(.9, .999), weight_decay=.01, fused=True)
if rank == 0:
    count = sum(w.numel() for w in weights['student'].values()) / 1e6
    print(f'networks: {count:.1f} M trained parameters in the student, {time.time() - began:.1f} s',
          flush=True)
# --------------------------------------------------------------------------------------------------

# stage 1's networks as it left them; the reference is its student, to the bit: first ratios are 1
inherited = m.newest_state(folder.parent, '--init', own=False)
inherited = m.load_state(inherited, weights, opts, partly=True)
if 'student' not in inherited:
    m.restore_student(base, nets['student'], folder, lora)
reference = m.frozen_copy(base, nets['student'], args.compile)
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
# --------------------------------------------------------------------------------------------------

rl_steps = [k for k in range(S - 1) if args.rl_steps == 'all' or k + 1 in high]
if not rl_steps:
    m.die(f'--rl_steps {args.rl_steps}: none of the steps {steps.long().tolist()} leads to a '
          'high-noise step; use --rl_steps all or more --steps')
# iterations: fake score and discriminator alone where they are new, then cycles of one distillation
# and rl_ratio preference updates
new = [name for name in ('fake', 'heads') if name in nets and name not in inherited]
alone = args.critic_warmup if new and args.joint else 0
cycle = args.rl_ratio + 1

def distils(it):
    return args.joint and (it < alone or (it - alone) % cycle == 0)

# --------------------------------------------------------------------------------------------------
# the reward, and the networks that judge the evaluations

sources = {name: score[1] for name, score in R.SCORES.items()}
sources |= dict(clip=args.judge, pickscore=args.pickscore)
wanted = {'clip', 'pickscore'} if args.eval_every else set()
wanted |= {args.reward} - {'latent'}
scorers = {}
for name in sorted(wanted):
    try:
        scorers[name] = R.SCORES[name][0](sources[name], device)
    except R.Unavailable as error:
        if name == args.reward:
            m.die(f'--reward {name}: {error}')
        if rank == 0:
            print(f'{name}: {error}; evaluations go without')
if args.reward == 'latent':
    lrm = m.load_latent_reward(args.lrm, base)

def reward(z, t, prompts):
    """The reward of noisy latents z (B, C, h, w) at times t (B,): (B,)."""
    if args.reward == 'latent':
        return lrm(z, t, lrm.encode(prompts))
    y = base.encode(prompts)
    rewards = []
    for k in range(0, len(z), args.micro):           # each takes 3.2 GB at 1024 px (tests/bench.py)
        j = slice(k, k + args.micro)
        x0 = base.x0(student, z[j], t[j], [v[j] for v in y])
        with base.autocast():
            pixels = base.decode(x0).float()
        rewards.append(scorers[args.reward].score((pixels / 2 + .5).clamp(0, 1), prompts[j]))
    return torch.cat(rewards)

# -- pictures to look at ---------------------------------------------------------------------------
grid_noise, _ = m.draw(args.seed, 0, range(len(prompts)), (S, *base.latent_shape))
grid_noise = grid_noise.to(device)
# --------------------------------------------------------------------------------------------------

loader = pictures.batches(
    mine, args.batch, filter(distils, range(start, args.iters)), args.workers)
if rank == 0:
    print(f'from {folder}, iteration {origin["iteration"]}; weights and moments of its state: '
          f'{", ".join(sorted(inherited)) or "none"}; new: {", ".join(new) or "none"}')
    print('settings handed on:', ' '.join(f'--{k} {v}' for k, v in handed.items()) or 'none')
    print(f'reward {args.lrm if args.reward == "latent" else args.reward}, preference updates at '
          f'{[int(steps[k]) for k in rl_steps]}, {alone} iterations for fake score and '
          'discriminator alone')

# --------------------------------------------------------------------------------------------------
# evaluations

watched = m.read_prompts(args.prompts)
near = R.near_prompts(args.prompts, len(watched))
watched = watched[:args.eval_n]
clip = scorers.get('clip')
if clip and args.eval_every and rank == 0:
    photos = pictures
    if args.real:
        photos = m.Pictures(
            args.real, args.real_files, '', '', base.size, args.seed, '--real', captioned=False)
    photos = [photos[i]['pixels'][None] / 2 + .5 for i in range(min(512, len(photos.rows)))]
    photos = torch.cat([clip.embed_images(x.to(device)).cpu() for x in photos])           # (n, D)
# the networks that judge wait in main memory while the run trains, but for one that is the reward
waiting = [scorer.cpu() for name, scorer in scorers.items() if name != args.reward]

@torch.no_grad()
def evaluate(it):
    """The reward, which is trained on, and what is not, on the student's pictures of `watched`: one
    JSON line in eval.jsonl. Every rank draws its share."""
    for net in waiting:
        net.to(device)
    # as many on every rank, some twice: the student may be sharded
    own = [i % len(watched) for i in range(rank, -(-len(watched) // world) * world, world)]
    found = {}
    for k in range(0, len(own), args.micro):
        index = own[k:k + args.micro]
        texts = [watched[i] for i in index]
        noise, _ = m.draw(args.seed, 1, index, (S + 1, *base.latent_shape))
        noise = noise.to(device)
        z = m.backward_simulation(base, student, steps, noise, base.encode(texts))
        x = (base.pictures(z) / 2 + .5).clamp(0, 1)                                   # (b, 3, H, W)
        t = steps[-1].expand(len(z))
        scores = dict(reward=reward(schedule.noised(z, noise[:, -1], t), t, texts))
        scores['brightness'] = x.mean((1, 2, 3))
        scores['saturation'] = (x.amax(1) - x.amin(1)).mean((1, 2))
        if 'pickscore' in scorers:
            scores['pickscore'] = scorers['pickscore'].score(x, texts)
        if clip:
            scores['vector'] = clip.embed_images(x)
        for j, i in enumerate(index):
            found[i] = {name: value[j].cpu() for name, value in scores.items()}
    shares = m.gathered(found)
    for net in waiting:
        net.to('cpu')
    if rank:
        return
    found = {i: scores for share in shares for i, scores in share.items()}
    scores = {name: torch.stack([found[i][name] for i in range(len(watched))]) for name in found[0]}
    vectors = scores.pop('vector', None)                                                  # (n, D)
    row = {name: value.mean().item() for name, value in scores.items()}
    if clip:
        margin = R.margins(clip, vectors, range(len(watched)), watched, near, args.seed)
        won = (margin >= 0).double()
        row |= dict(rprecision=won.mean().item(), cmmd=R.cmmd(vectors, photos))
    print(f'{it:5d}/{args.iters}  evaluation  '
          + '  '.join(f'{name} {value:.4f}' for name, value in row.items()), flush=True)
    with (out / 'eval.jsonl').open('a') as file:
        file.write(json.dumps(dict(iteration=it) | row) + '\n')

# -- pieces of an iteration ------------------------------------------------------------------------

def micro_batches(it, rows):
    """This rank's micro-batches of iteration it: prompts y, real pictures, and by its name every
    random number that an iteration needs, eps_ (b, C, h, w) and times t (b,)."""
    eps, u = m.draw(args.seed, it, mine, (S + 5, *base.latent_shape))
    y = base.encode(rows['text'])
    for k in range(0, len(mine), args.micro):
        j = slice(k, k + args.micro)
        normals = eps[j].to(device)
        u_tau, u_adv, u_fake, u_D = u[j].to(device).unbind(1)
        b = SimpleNamespace(y=[v[j] for v in y], real=rows['pixels'][j].to(device))
        b.eps_steps = normals[:, :S]                   # (b, S, C, h, w), of the student's own steps
        b.eps_tau, b.eps_low, b.eps_made, b.eps_fake, b.eps_real = normals[:, S:].unbind(1)
        b.tau = schedule.between(u_tau, 20, 980)       # of the DM loss
        b.t_fake = schedule.training(u_fake)           # of the fake score's own loss
        b.t_adv = schedule.between(u_adv, 0, 999)      # of the latent GAN
        b.t_D = schedule.between(u_D, 0, 999)
        yield b

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
    """L2 norm of one sample's gradient, the mean over a batch whose loss is a mean: (b, ...)."""
    return d.flatten(1).norm(dim=1).mean() * len(d)

def warmed(it):
    """Share of the learning rates: linear warm-up and cool-down."""
    up = (it + 1) / max(1, args.warmup)
    down = (args.iters - it) / max(1, args.cooldown)
    return min(1., up, down)

# --------------------------------------------------------------------------------------------------

def captions(it):
    """This rank's prompts of a preference update."""
    if rl_prompts is None:
        return pictures.captions(it * args.batch + i for i in mine)
    return [pick(rl_prompts, it, 3 + i) for i in mine]

def log_ratio(z, x0, x_ref, a, sigma):
    """log p(z) / p_ref(z) of N(a x0, sigma^2) and N(a x_ref, sigma^2), the mean over dimensions, as
    a product, since the two squares differ in their last digits only: (b, C, h, w) -> (b,)."""
    return (a * (x0 - x_ref) * (z - a * (x0 + x_ref) / 2) / sigma ** 2).mean((1, 2, 3))

# --------------------------------------------------------------------------------------------------

told = m.hear()                      # Ctrl-C or SIGTERM: the iteration is finished, then a save
log = m.Log(out, start, device, args)
for it in range(start, args.iters + 1):
    # a hung rank ends by itself, with the line at which it stands
    faulthandler.dump_traceback_later(60 * args.timeout, exit=True)
    # all ranks leave after the same iteration, whichever was told to
    stop = m.any_rank(told, device) or it == args.iters
    if args.sample_every and (it % args.sample_every == 0 or it == args.iters):
        with torch.compiler.set_stance('force_eager'):        # compiled graphs are of whole --micro
            rows = [m.student_pictures(base, net, steps, prompts, grid_noise, args.micro)
                    for net in (reference, student)]
        if rank == 0:
            m.picture_grid(rows, prompts, out / f'samples-{it:07d}.png',
                           ['stage 1: ', 'stage 2: '])
    if args.eval_every and (it % args.eval_every == 0 or it == args.iters):
        with torch.compiler.set_stance('force_eager'):
            evaluate(it)
    if it > start and (it % args.save_every == 0 or stop):
        facts = dict(base_model=m.settings(args)['model'], recipe=recipe, iteration=it,
                     cfg=args.cfg, t5=args.t5, prompts=prompts)
        m.save_state(out, it, args, weights, opts, stop, lambda: m.save_student(
            out / 'student', base, nets['student'], steps, args.save_dtype, facts, lora))
    if stop:
        break

    for name, opt in opts.items():
        rate = rates[name] if name != 'student' or distils(it) else args.rl_lr
        for group in opt.param_groups:
            group['lr'] = rate * warmed(it)

    if not distils(it):
        # one preference update of the student, from step s to the next one, s'
        s = pick(rl_steps, it, 1)
        t_next = steps[s + 1:s + 2]
        a, sigma = schedule.alpha(t_next), schedule.sigma(t_next)
        texts = captions(it)
        log.data.update(cut=base.cut(texts))
        y = base.encode(texts)
        eps, _ = m.draw(args.seed, it, mine, (S + args.candidates, *base.latent_shape))
        for k in range(0, len(mine), args.micro):
            j = slice(k, k + args.micro)
            y_j = [v[j] for v in y]
            eps_steps, eps_next = eps[j].to(device).split([S, args.candidates], 1)
            z_s, t_s = m.reach(base, student, steps, eps_steps, y_j, s)
            x0 = base.x0(student, z_s, t_s, y_j)                                    # (b, C, h, w)
            with torch.no_grad():
                x_ref = base.x0(reference, z_s, t_s, y_j)
                z = a * x0[:, None] + sigma * eps_next                           # (b, K, C, h, w)
                each = [text for text in texts[j] for _ in range(args.candidates)]
                r = reward(z.flatten(0, 1), t_next.expand(len(each)), each).view(z.shape[:2])
                w = z[torch.arange(len(z)), r.argmax(1)]                            # (b, C, h, w)
                l = z[torch.arange(len(z)), r.argmin(1)]
                    # a group with a NaN among its rewards teaches nothing
                sound = r.isfinite().all(1)

                # eq. 12-13: H = log p(w) / p_ref(w) - log p(l) / p_ref(l). Both have the mean a x0,
                # so the squares cancel and what is left is linear in x0
            H = (a * (x0 - x_ref) * (w - l) / sigma ** 2).mean((1, 2, 3))           # (b,), 0 first
            if args.clamp:
                least, most = math.log(1 - args.clamp), math.log(1 + args.clamp)
                H = (log_ratio(w, x0, x_ref, a, sigma).clamp(least, most)
                     - log_ratio(l, x0, x_ref, a, sigma).clamp(least, most))
            L = torch.where(sound, -F.logsigmoid(args.beta * H), 0.).mean()
            (L / n).backward()
            r = r.masked_fill(~sound[:, None], 0.)
            log('rl/loss', L)
            log('rl/ratio', H.exp().mean())
            log('rl/unsound', (~sound).float().mean())
            log('rl/gap', (r.amax(1) - r.amin(1)).mean())
            log(f'reward/{int(steps[s])}', r.mean())
        norms = [m.update(opts['student'], nets['student'])]
        log.count(it, norms)
        log.write(it + 1)
        continue

    # the student learns in this iteration
    learns = it >= alone and (it - alone) // cycle % args.ttur == 0

    # -- one distillation --------------------------------------------------------------------------
    rows = next(loader)
    log.data.update(rows['trouble'], cut=base.cut(rows['text']))
    batches = list(micro_batches(it, rows))                  # both halves below go through them
    # one step for the whole batch: shorter simulations end together, on every rank
    s = pick(high if args.split else range(S), it, 1)
    l = pick(low, it, 2) if args.split else s
    norms = []
    for b in batches:
        with torch.set_grad_enabled(learns):
            # 1. high noise: the student's sample at its step s
            x_s, t_s = m.reach(base, student, steps, b.eps_steps, b.y, s)
            x0 = base.x0(student, x_s, t_s, b.y)                                    # (b, C, h, w)

            # 2. low noise: finished without gradient, noised to step l, cleaned once with gradient
            z = x0
            if gan and args.split:
                end = m.backward_simulation(
                    base, student, steps, b.eps_steps, b.y, first=s + 1, x0=x0.detach())
                t_l = steps[l].expand(len(end))
                x_l = schedule.noised(end, b.eps_low, t_l)
                z = base.x0(student, x_l, t_l, b.y)                                 # (b, C, h, w)

            # 3. the losses are functions of these two: D and the fake score, through which they
            # go, get no gradient
            x = x0.detach().requires_grad_(learns)
            v = z.detach().requires_grad_(learns)
            made = seen(v, it) if gan else v
            b.x0, b.made = x.detach(), made.detach()
            if not learns:
                continue                                       # samples are all that is wanted

            # distribution matching, eq. 4: g = (f - r) / mean|x0 - r| is the slope of L_DM at x0
            with torch.no_grad():
                x_tau = schedule.noised(x, b.eps_tau, b.tau)
                r = base.x0(base.teacher, x_tau, b.tau, b.y, args.cfg)
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
            torch.autograd.backward([x0, z], [d_x / n, d_v / n])
        log(f'dm/{int(steps[s])}', L_DM)
        log('grad/dm', norm(d_x))
        if gan:
            log('gan/g', L_adv)
            log('grad/gan', norm(d_v))

    if learns:
        norms.append(m.update(opts['student'], nets['student']))
    if learns and norms[0] is not None:
        log('norm/student', norms[0])
        # coupling, eq. 11: psi <- c psi + (1 - c) theta
        with torch.no_grad():
            for name, psi in weights['fake'].items():
                psi.lerp_(weights['student'][name], 1 - args.couple)

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
            real, made = logits.chunk(2)
            if args.gan == 'pixel':
                L_D = F.relu(1 - real).mean() + F.relu(1 + made).mean()
                L = L + L_D
            else:                    # DMD2's D is the fake score's own half: it gets a small weight
                L_D = F.softplus(-real).mean() + F.softplus(made).mean()
                L = L + 1e-2 * L_D
            log('gan/d', L_D)
            log('gan/real', real.mean())
            log('gan/made', made.mean())
        (L / n).backward()                             # gradients add up over micro-batches
    # None where a gradient was not finite and the update was dropped, on all ranks alike
    norms += [m.update(opts[name], nets[name]) for name in nets if name != 'student']
    # ----------------------------------------------------------------------------------------------

    log.count(it, norms)
    log.write(it + 1)

if rank == 0 and 0 < it <= alone:
    print(f'the student is unchanged: all {it} iterations were the warm-up of fake score and '
          f'discriminator, --critic_warmup {args.critic_warmup}')

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
