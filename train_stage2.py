"""
Flash-DMD, stage 2 (arXiv 2511.20549, eq. 12-13): the distillation of stage 1 goes on, in the same
lines, and after each of its updates of the student come --rl_ratio preference updates on noisy
latents. One preference update, --rl pairs:

    z_s          the student's input at a high-noise step s, by backward simulation; x0 = G(z_s)
    candidates   z_k = alpha' x0 + sigma' eps_k, k = 1..K: the sampler's own next states, at step s'
    pair         a reward scores each at its own noise level; best = winner w, worst = loser l. A
                 latent reward model reads the noisy latents; a reward of pictures (--reward
                 pickscore...) what the student makes of them in one step, decoded
    loss         -log sigmoid(beta (log p(w) / p_ref(w) - log p(l) / p_ref(l))), p the Gaussian
                 N(alpha' x0, sigma'^2) of that step, p_ref that of the student as stage 2 found it

Two other papers have their RL on this page, beside the same distillation:

    --rl refl    DMDR (2511.13649): relu(goal - reward) of x0's picture, differentiated through VAE
                 and reward, is summed with the DM loss in every iteration, no alternation
    --rl grpo    DMDR's policy gradient: K rollouts of a prompt from one z_0; whoever ends in a
                 picture better than its group's mean gets its own steps made likelier. With
                 --reward discriminator AdvDMD (2604.28126): the latent GAN's D, which learns the
                 student's states at every step, is the reward of every state

Left out of GRPO: the KL to a reference, since DM keeps the student at its teacher; several updates
of a rollout (with one the ratio is 1 and needs no clip; --clamp is one); the deviation of each
group, which makes noise as loud as a signal: it is that of all groups, with a floor.

    python train_stage2.py                          # from out/stage1, else from the shipped student
    torchrun --nproc_per_node=8 train_stage2.py     # 8 GPUs, the same result
    python train_stage2.py --no-joint --gan none --out out/rl_alone     # without distillation

Running the same command again resumes. out/stage2 gets what stage 1's folder has, and eval.jsonl.
"""

import argparse
import faulthandler
import itertools
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
SD3 = dict(reward=['pickscore'], lrm='', rl_steps='all', beta=100.)
RECIPES['sd3'] = RECIPES['sdxl'] | SD3 | dict(
    cfg=7., batch=32, ttur=2, student_lr=3e-5, fake_lr=3e-5, rl_lr=1e-5)
RECIPES['qwen'] = RECIPES['sdxl'] | SD3 | dict(
    cfg=4., batch=32, ttur=2, student_lr=1e-4, fake_lr=2e-5, rl_lr=3e-5)
RECIPES['zimage'] = RECIPES['qwen'] | dict(cfg=5.)
RECIPES['toy-sd3'] = RECIPES['toy'] | SD3 | dict(
    iters=240, cooldown=60, student_lr=1e-4, fake_lr=5e-4, rl_lr=1e-4, save_every=120,
    sample_every=120, eval_every=120)
# adapters learn at other rates than whole networks
LORA_RATES = dict(
    sdxl=dict(student_lr=5e-5, fake_lr=5e-5, rl_lr=1e-5),
    toy=dict(student_lr=2e-4, fake_lr=5e-4, rl_lr=1e-4))
WHOLE_RATES = dict.fromkeys(
    ['sd3', 'qwen', 'zimage'], dict(student_lr=1e-6, fake_lr=1e-6, rl_lr=1e-6))
WHOLE_RATES['toy-sd3'] = dict(student_lr=2e-5, fake_lr=1e-4, rl_lr=1e-5)
# with --rl grpo, and with AdvDMD's reward, whose paper has no numbers: all of these are ours
GRPO = dict(rl_ratio=1, rl_steps='all')
ADVDMD = dict(gan='latent', gan_weight=0., split=False, ttur=2, couple=1.)
# what stage 1 hands on, if its args.json lies beside the student: add a flag of your own
HANDED = ('offload sam data data_files prompts_only image_column text_column data_limit prompts '
          'workers cfg gan gan_weight gan_crop split ttur couple batch micro heads_lr '
          'grad_checkpointing save_dtype fake_lora renoise rollout').split()

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
# -- flags of the preference updates ---------------------------------------------------------------
flag = p.add_argument_group('preference updates').add_argument
flag('--rl', choices=['pairs', 'grpo', 'refl'], default='pairs',
     help="Flash-DMD's pairs, policy gradient (DMDR, AdvDMD), or a differentiated reward (DMDR)")
flag('--reward', nargs='+', choices=['latent', 'discriminator', *R.SCORES], default=['latent'],
     help="latent: --lrm; discriminator: AdvDMD's; else of pictures, by the checkpoints of "
     'rewards.py, --judge, --pickscore')
flag('--reward_weight', type=float, nargs='+', default=[1.], help='one for each --reward')
flag('--goal', type=float, default=.7, help='refl: a reward, as a cosine, above it is enough')
flag('--lrm', help='latent reward model in the layout of casiatao/LRM: folder or hub id/subfolder')
flag('--joint', action=yes_no, default=True, help='distil as well; no: preference updates only')
flag('--rl_ratio', type=int, default=5, help='preference updates for one update by distillation')
flag('--rl_steps', choices=['high', 'all'], default='high',
     help='steps s that get them: those that lead to a high-noise step, or all but the last')
flag('--rl_lr', type=float, help="the student's learning rate in preference updates")
flag('--rl_prompts', default='', help='text file of their prompts; empty: the captions of --data')
flag('--candidates', type=int, default=4, help='K, next states of a z_s, or rollouts of a prompt')
flag('--beta', type=float, default=500., help='sharpness; log p are means over dimensions')
flag('--clamp', type=float, default=0., help='keep p / p_ref within 1 -+ this; 0: off')
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
p.set_defaults(**(LORA_RATES if adapters['rank'] else WHOLE_RATES).get(recipe, {}))
p.set_defaults(
    **handed, model=origin['base_model'], steps=len(origin['steps']), t5=origin.get('t5'),
    base_lora=origin.get('base_lora') or [],
    lora=adapters['rank'], lora_alpha=adapters['alpha'], lora_targets=','.join(adapters['targets']))
if chosen.prompts_only:
    p.set_defaults(gan='none')
if p.parse_known_args()[0].gan != p.get_default('gan'):     # what was handed on is of another kind
    p.set_defaults(gan_weight=5e-3 if chosen.gan == 'latent' else RECIPES[recipe]['gan_weight'])
if chosen.rl == 'grpo':
    p.set_defaults(**GRPO)
if chosen.reward == ['discriminator']:
    p.set_defaults(**ADVDMD)
if p.get_default('data') != RECIPES[recipe]['data']:
    p.set_defaults(real='', real_files='')
m.give_way(p, 'data', 'data_files', 'image_column', 'text_column', 'real', 'real_files',
           'prompts_only')
m.give_way(p, 'real', 'real_files')
args = p.parse_args()
args.recipe, args.init = recipe, str(folder)
args.init_iteration = origin['iteration']        # a state goes on from the same student alone
if args.check:                               # a distillation and a preference update
    args.out, args.iters, args.log_every = args.out.rstrip('/') + '-check', 2, 1
    args.critic_warmup = 0
m.at_least(args, rl_ratio=1, candidates=2, critic_warmup=0, eval_every=0, eval_n=1, clamp=0, beta=0,
           rl_lr=0, goal=-1)
pixels = all(name in R.SCORES for name in args.reward)                       # all are of pictures
if len(args.reward) > 1 and not pixels:
    m.die(f'--reward {" ".join(args.reward)}: only rewards of pictures can be added up')
if len(args.reward) != len(args.reward_weight):
    m.die(f'--reward_weight {args.reward_weight}: give one for each of --reward {args.reward}')
if args.rl == 'refl' and not pixels:
    m.die(f'--reward {args.reward[0]} has no gradient here; give --rl refl one of pictures')
if 'discriminator' in args.reward and args.gan != 'latent':
    m.die(f'--reward discriminator: --gan {args.gan} trains none on latents; give --gan latent')
if 'discriminator' in args.reward and args.gan_weight:
    m.die(f'--gan_weight {args.gan_weight}: with --reward discriminator D learns only the noise '
          "levels of the student's states, not those of this loss; leave it away")
if args.rl == 'grpo' and args.batch % args.candidates:
    m.die(f'--batch {args.batch} is not a multiple of --candidates {args.candidates}, the rollouts '
          'of a prompt; change one of them')
if args.clamp >= 1:
    m.die(f'--clamp {args.clamp} must be below 1')
rl_prompts = m.read_prompts(args.rl_prompts, '--rl_prompts') if args.rl_prompts else None
if args.lora != adapters['rank']:
    m.die(f'--lora {args.lora}: the student in {folder} is one of --lora {adapters["rank"]} and '
          'stays one; leave --lora away')

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

# stage 1's networks as it left them; the reference is its student, to the bit: first ratios are 1
inherited = m.newest_state(folder.parent, '--init', own=False)
inherited = m.load_state(inherited, weights, opts, partly=True)
if 'student' not in inherited:
    m.restore_student(base, nets['student'], folder, lora)
reference = m.frozen_copy(base, nets['student'], args.compile)
# preference updates have moments of their own: of adapters their gradients are tens of times those
# of DM, which would drown in one AdamW
weights['rl'] = weights['student']
rates['rl'] = args.rl_lr
opts['rl'] = torch.optim.AdamW(
    weights['rl'].values(), lr=args.rl_lr, betas=(.9, .999), weight_decay=.01, fused=True)
adversarial = args.rl == 'grpo' and 'discriminator' in args.reward
if adversarial:              # D's last logits at each level, saved with the state; inf: none as yet
    weights['logits'] = {x: torch.full((args.steps, 512), math.inf) for x in ('real', 'made')}
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

levels = torch.cat([steps[1:], steps.new_zeros(1)])         # of the states that the steps lead to
rl_steps = [k for k in range(S - 1) if args.rl_steps == 'all' or k + 1 in high]
if args.rl == 'refl':
    rl_steps = [*range(S)]
if not rl_steps:
    way_out = 'more --steps' if S == 1 else '--rl_steps all'
    m.die(f'--rl_steps {args.rl_steps}: none of the steps {steps.long().tolist()} is one that gets '
          f'preference updates; use {way_out}')
# iterations: fake score and discriminator alone where they are new, then cycles of --ttur
# distillations, one of which updates the student, and rl_ratio preference updates
new = [name for name in ('fake', 'heads') if name in nets and name not in inherited]
alone = args.critic_warmup if new and args.joint else 0
cycle = args.ttur + args.rl_ratio
rl = [it >= alone and (it - alone) % cycle >= args.ttur for it in range(args.iters)]
if adversarial:
    # AdvDMD begins with DM: policy updates from a quarter of the run, --rl_ratio of them from half
    ratios = [args.rl_ratio * min(max(4 * it / args.iters - 1, 0), 1) for it in range(args.iters)]
    shares = [ratio / (args.ttur + ratio) for ratio in ratios]
    due = [int(x) for x in itertools.accumulate(shares)]
    rl = [it >= alone and due[it] > due[it - 1] for it in range(args.iters)]
if args.check:
    rl[-1] = True

def distils(it):
    return args.joint and (args.rl == 'refl' or not rl[it])

# --------------------------------------------------------------------------------------------------
# the reward, and the networks that judge the evaluations

sources = {name: score[1] for name, score in R.SCORES.items()}
sources |= dict(clip=args.judge, pickscore=args.pickscore)
wanted = {'clip', 'pickscore'} if args.eval_every else set()
wanted |= {*args.reward} & R.SCORES.keys()
scorers = {}
for name in sorted(wanted):
    try:
        scorers[name] = R.SCORES[name][0](sources[name], device)
    except R.Unavailable as error:
        if name in args.reward:
            m.die(f'--reward {name}: {error}')
        m.print0(f'{name}: {error}; evaluations go without')
if args.reward == ['latent']:
    lrm = m.load_latent_reward(args.lrm, base)

def of_pictures(x0, prompts):
    """Each of --reward, (b,), of the pictures of clean latents (b, C, h, w); differentiable."""
    with base.autocast():
        x = base.decode(x0).float()
    x = (x / 2 + .5).clamp(0, 1)
    return [scorers[name].score(x, prompts) for name in args.reward]

def weighted(rewards):
    return sum(w * r for w, r in zip(args.reward_weight, rewards))

def refl(x0, prompts):
    """DMDR's sum over rewards of w relu(goal - r), r a cosine, of clean latents (b, C, h, w)."""
    L = 0.
    for name, w, r in zip(args.reward, args.reward_weight, of_pictures(x0, prompts)):
        log(f'reward/{name}', r.mean())
        L = L + w * F.relu(args.goal - r / getattr(scorers[name], 'scale', 1)).mean()
    return L

def reward(z, t, prompts):
    """The reward of noisy latents z (B, C, h, w) at times t (B,): (B,)."""
    if args.reward == ['latent']:
        return lrm(z, t, lrm.encode(prompts))
    y = base.encode(prompts)
    if args.reward == ['discriminator']:
        with torch.no_grad():                         # what is learnt from it is the heads' alone
            *_, bottleneck = base.features(nets['fake'], z, t, y)
        return heads(bottleneck)[:, 0]
    rewards = []
    for k in range(0, len(z), args.micro):           # each takes 3.2 GB at 1024 px (tests/bench.py)
        j = slice(k, k + args.micro)
        x0 = base.x0(student, z[j], t[j], [v[j] for v in y])
        rewards.append(weighted(of_pictures(x0, prompts[j])))
    return torch.cat(rewards)

# -- pictures to look at ---------------------------------------------------------------------------
grid_noise, _ = m.draw(args.seed, 0, range(len(prompts)), (S, *base.latent_shape))
grid_noise = grid_noise.to(device)
# --------------------------------------------------------------------------------------------------

loader = pictures.batches(
    mine, args.batch, [it for it in range(start, args.iters) if distils(it) or adversarial],
    args.workers)
if rank == 0:
    print(f'from {folder}, iteration {origin["iteration"]}; weights and moments of its state: '
          f'{", ".join(sorted(inherited)) or "none"}; new: {", ".join(new) or "none"}')
    print('settings handed on:', ' '.join(f'--{k} {v}' for k, v in handed.items()) or 'none')
    print(f'--rl {args.rl}, reward {args.lrm if args.reward == ["latent"] else args.reward}, '
          f'preference updates at {[int(steps[k]) for k in rl_steps]}, {alone} iterations for fake '
          'score and discriminator alone')

# --------------------------------------------------------------------------------------------------
# evaluations

watched = m.read_prompts(args.prompts)
near = R.near_prompts(args.prompts, len(watched))
watched = watched[:args.eval_n]
clip = scorers.get('clip')
photos = []                                            # none, and no CMMD, of --prompts_only alone
if clip and args.eval_every and rank == 0 and (args.real or not args.prompts_only):
    photos = pictures
    if args.real:
        photos = m.Pictures(
            args.real, args.real_files, '', '', base.size, args.seed, '--real', captioned=False)
    photos = [photos[i]['pixels'][None] / 2 + .5 for i in range(min(512, len(photos.rows)))]
    photos = torch.cat([clip.embed_images(x.to(device)).cpu() for x in photos])           # (n, D)
# the networks that judge wait in main memory while the run trains, but for one that is the reward
waiting = [scorer.cpu() for name, scorer in scorers.items() if name not in args.reward]

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
        row |= dict(rprecision=(margin >= 0).double().mean().item())
        row |= dict(cmmd=R.cmmd(vectors, photos)) if len(photos) else {}
    print(f'{it:5d}/{args.iters}  evaluation  '
          + '  '.join(f'{name} {value:.4f}' for name, value in row.items()), flush=True)
    with (out / 'eval.jsonl').open('a') as file:
        file.write(json.dumps(dict(iteration=it) | row) + '\n')

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

def captions(it, samples=mine):
    """The prompts of a preference update, by default this rank's."""
    if rl_prompts is None:
        return pictures.captions(it * args.batch + i for i in samples)
    return [pick(rl_prompts, it, 3 + i) for i in samples]

def log_ratio(z, x0, x_ref, a, sigma):
    """log p(z) / p_ref(z) of N(a x0, sigma^2) and N(a x_ref, sigma^2), the mean over dimensions, as
    a product, since the two squares differ in their last digits only: (b, C, h, w) -> (b,)."""
    return (a * (x0 - x_ref) * (z - a * (x0 + x_ref) / 2) / sigma ** 2).mean((1, 2, 3))

def state_after(x0, eps, k):
    """(z, t), the student's state after its step k: x0 at the next step's noise level, with that
    step's noise of eps (b, S, C, h, w); after the last as it is, at 0."""
    t = levels[k].expand(len(x0))
    return (schedule.noised(x0, eps[:, k + 1], t) if k + 1 < S else x0), t

def of_states(x0, eps, texts):
    """Rewards (b, S) of the student's states after each of its steps; x0: S clean latents."""
    states = [state_after(x0[k], eps, k) for k in range(S)]
    return torch.stack([reward(z, t, texts) for z, t in states], 1)

def auc(real, made):
    """P(D(real) > D(made)) + P(they are equal) / 2 at each level: (S, N) -> (S,)."""
    more = real[:, :, None] - made[:, None]
    return ((more > 0).float() + .5 * (more == 0).float()).mean((1, 2))

def advantages(r, K, floor):
    """GRPO's, of rewards r (B, J) in groups of K: above the group's mean, over the deviation within
    groups, of all together, which is at least floor (J,). A group with a NaN has 0."""
    r = r.double().unflatten(0, (-1, K))                                            # (P, K, J)
    over = torch.where(r.isfinite().all(1, keepdim=True), r - r.mean(1, keepdim=True), 0.)
    deviation = over.square().mean((0, 1)).sqrt().maximum(floor).clamp(min=1e-12)
    return (over / deviation).flatten(0, 1).float()

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
        for group in opt.param_groups:
            group['lr'] = rates[name] * warmed(it)

    if not distils(it) and args.rl == 'grpo':
        # K rollouts of a prompt from one z_0: sample i has those of the first in its group
        K = args.candidates
        firsts = [i - i % K for i in mine]
        texts = captions(it, firsts)
        y = base.encode(texts)
        eps, _ = m.draw(args.seed, it, mine, (2 * S, *base.latent_shape))
        eps[:, :1], _ = m.draw(args.seed, it, firsts, (1, *base.latent_shape))
        rows = next(loader) if adversarial else {}
        log.data.update(rows.get('trouble'), cut=base.cut(texts))
        rollouts, made, real = [], [], []
        for i in range(0, len(mine), args.micro):
            j = slice(i, i + args.micro)
            b = SimpleNamespace(y=[v[j] for v in y], eps=eps[j, :S].to(device), x=[None])
            rollouts.append(b)
            for k in range(S):                             # x[k + 1] is the student's at its step k
                b.x.append(m.backward_simulation(
                    base, student, steps, b.eps, b.y, k, k + 1, b.x[k]))
            if pixels:                                               # of the finished picture alone
                r = weighted(of_pictures(b.x[S], texts[j]))[:, None]
            else:
                r = of_states(b.x[1:], b.eps, texts[j])                                   # (b, S)
            made.append(r.detach().cpu())
            if adversarial:                 # D scores all of this before it learns any of it, below
                x = base.latents(rows['pixels'][j].to(device))
                at_real = of_states([x] * S, eps[j, S:].to(device), rows['text'][j])
                L_D = F.softplus(-at_real).mean() + F.softplus(r).mean()
                (1e-2 * L_D / n).backward()          # as in a distillation: one AdamW learns both
                log('gan/d', L_D)
                real.append(at_real.detach().cpu())

        # a group's scores may come from several ranks
        r = torch.cat(m.gathered(torch.cat(made)))                                    # (B, S or 1)
        last = [r.T]
        if adversarial:
            at_real = torch.cat(m.gathered(torch.cat(real)))
            for kept, new in zip(weights['logits'].values(), (at_real, r)):
                kept.copy_(torch.cat([kept, new.T], 1)[:, -512:])
            last = [*weights['logits'].values()]
        last = [x[:, x.isfinite().all(0)] for x in last]                               # (S or 1, N)
        A = advantages(r, K, .1 * torch.cat(last, 1).std(1).nan_to_num())
        if adversarial:
            # a level where D cannot tell, or always can, has nothing to teach
            share = auc(*last)
            A = A * ((.55 < share) & (share < .98))
            for k in range(S):
                log(f'auc/{int(levels[k])}', share[k])
        # a step is worth the mean advantage of the states after it
        to_go = torch.stack([A[:, k - S:].mean(1) for k in range(S)], 1).clamp(-5, 5)      # (B, S)
        for b, gain in zip(rollouts, to_go[mine].to(device).split(args.micro)):
            for k in rl_steps if to_go.any() else ():    # without a gradient not even moments move
                z, t = m.at_step(base, steps, b.eps, k, b.x[k])
                x0 = base.x0(student, z, t, b.y)                                    # (b, C, h, w)
                z, t = state_after(b.x[k + 1], b.eps, k)
                ratio = log_ratio(z, x0, b.x[k + 1], schedule.alpha(t), schedule.sigma(t)).exp()
                L = -ratio * gain[:, k]
                if args.clamp:
                    inside = ratio.clamp(1 - args.clamp, 1 + args.clamp)
                    L = L.maximum(-inside * gain[:, k])
                (L.mean() / (n * len(rl_steps))).backward()
                log('rl/ratio', ratio.mean())
        norms = [m.update(opts['rl'], nets['student'])]
        if adversarial:
            norms.append(m.update(opts['heads'], nets['heads']))
        log('rl/advantage', to_go.abs().mean())
        log('reward/states', r.nanmean())
        log.count(it, norms)
        log.write(it + 1)
        continue

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
            if args.rl == 'refl':                                  # --no-joint: the reward alone
                (refl(x0, texts[j]) / n).backward()
                continue
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
        norms = [m.update(opts['rl'], nets['student'])]
        log.count(it, norms)
        log.write(it + 1)
        continue

    # the student learns in every ttur-th distillation
    learns = it >= alone and sum(map(distils, range(alone, it))) % args.ttur == 0

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
        # ------------------------------------------------------------------------------------------

        if args.rl == 'refl':
            # DMDR's ReFL: the reward of x0, differentiated, is summed with the DM loss
            d_R, = torch.autograd.grad(refl(x, b.text), [x])
            d_x = d_x + d_R
            log('grad/reward', norm(d_R))

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

    # ----------------------------------------------------------------------------------------------

    # AdvDMD: D learns the student's states, each at the noise level to which its step leads
    for b in batches if 'discriminator' in args.reward else ():
        b.t_D = levels[l].expand_as(b.t_D)

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
