"""
Flash-DMD, stage 2: the distillation of stage 1 goes on, and after each of its iterations come --rl_ratio preference updates of
the student, on noisy latents (arXiv 2511.20549, eq. 12-13). One preference update:

    z_s          by backward simulation, s a high-noise step
    candidates   z' = alpha' G(z_s) + sigma' eps_k, k = 1..K: the sampler's own next states, at step s'
    pair         the reward scores each at its own noise level; best = winner w, worst = loser l. A latent reward model reads
                 the noisy latents; a reward of pictures (--reward pickscore...) what the student makes of them in one step
    loss         -log sigmoid(beta (log p(w) / p_ref(w) - log p(l) / p_ref(l))), p the sampler's Gaussian transition,
                 p_ref that of the student as stage 2 found it

    python train_stage2.py                                  # goes on from out/stage1, else from the shipped student
    torchrun --nproc_per_node=8 train_stage2.py             # 8 GPUs, the same result
    python train_stage2.py --no-joint --gan none --out out/rl_alone        # preference updates only: over-optimises

Running the same command again resumes. out/stage2 gets what stage 1's folder has, and eval.jsonl.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import model as m
import rewards as R

# ---------------------------------------------------------------------------------------------------------------------
# settings: what a run of stage 1 was told it hands on (args.json); this table fills the rest, and every flag overrides.
# Learning rates, beta, weights: not in the paper

RECIPES = {
    'sdxl': dict(
        sam='vit_b', data='jackyhate/text-to-image-2M', data_files='data_1024_10K/*.tar', image_column='jpg',
        text_column='json.prompt', prompts='assets/prompts.txt', lrm='casiatao/LRM/lrm_sdxl', cfg=8., gan_weight=1e-2,
        batch=64, micro=1, iters=2000, student_lr=1e-6, fake_lr=1e-6, heads_lr=1e-4, rl_lr=1e-6,
        beta=500., warmup=50, cooldown=0, checkpointing=True, critic_warmup=100, save_every=250, sample_every=250,
        reward='latent', eval_every=250, log_every=6, judge=R.CLIP_L, pickscore='yuvalkirstain/PickScore_v1', real='',
        real_files=''),
    # tried on seed 0, before any other: rl_lr 2e-5 with student lr 5e-5, fake lr 2e-4 raised the reward by .58 in 330 updates,
    # and CMMD from .088 to .127 (128 prompts, an unfinished reward model); rl_lr 1e-5 with these and gan_weight .3 was no
    # better than what stands here (CMMD .089 against .084 after 200). Table of the final settings: README
    'toy': dict(
        sam='assets/toy/sam.pth', data='assets/toy/data', data_files='train.parquet', image_column='image',
        text_column='text', prompts='assets/toy/data/prompts.txt', lrm='assets/toy/lrm', cfg=3., gan_weight=.1,
        batch=16, micro=16, iters=330, student_lr=2e-5, fake_lr=1e-4, heads_lr=2e-4, rl_lr=1e-5,
        beta=500., warmup=30, cooldown=0, checkpointing=False, critic_warmup=30, save_every=110, sample_every=110,
        reward='latent', eval_every=110, log_every=6,
        judge='assets/toy/clip', pickscore='assets/toy/pickscore', real='assets/toy/data', real_files='test.parquet'),
}
# SD3 has no public latent reward model. Its first two steps lead to t = 900 and 750, where SNR is .012 and .11 and a preference
# hardly moves anything, so the third counts as well. Tried on the toy's seed 0 (256 prompts; PickScore .6387, R-precision
# 51.2 %, CMMD .116 before): high steps only .6362 / 48.8 / .172 (and without distillation PickScore fell from the start);
# all steps, beta 500 with rl_lr 1e-4, 2e-4: .6425 / 51.6 / .109, .6421 / 51.2 / .124; beta 100 (these): .6457 / 54.3 / .104
# with --reward latent --lrm assets/toy/lrm_sd3: .6331 / 46.1 / .231; and rl_lr 2e-5: .6376 / 50.8 / .161; or rl_ratio 1:
# .6435 / 52.0 / .157 (and with seed 1 .6356 / 52.7 / .154 from .6372 / 55.5 / .125)
RECIPES['sd3'] = RECIPES['sdxl'] | dict(reward='pickscore', lrm='', cfg=7., batch=32, ttur=2, student_lr=3e-5, fake_lr=3e-5,
                                        rl_lr=1e-5, rl_steps='all', beta=100.)
RECIPES['toy-sd3'] = RECIPES['toy'] | dict(
    reward='pickscore', lrm='', iters=240, save_every=120, sample_every=120, eval_every=120, student_lr=1e-4, fake_lr=5e-4,
    rl_lr=1e-4, rl_steps='all', beta=100., cooldown=60)

# of adapters: the toy's are ten times those of all weights, SDXL's untried
LORA_RATES = {'sdxl': dict(student_lr=5e-5, fake_lr=5e-5, rl_lr=1e-5), 'toy': dict(student_lr=2e-4, fake_lr=5e-4, rl_lr=1e-4)}

p = m.parser(__doc__)
p.add_argument('--recipe', choices=['', *RECIPES], default='', help="table of defaults; empty: the student's own")
p.add_argument('--init', default='', help='run of stage 1, or a student pipeline; empty: out/stage1, else the shipped student')
p.add_argument('--out', default='out/stage2', help='folder of the run; holds its state, so the same command resumes')
m.training_flags(p, model_help="teacher; the student's own unless given")
# preference
p.add_argument('--reward', choices=['latent', *R.SCORES],
               help='latent: --lrm; else a reward of pictures, its weights as evaluate.py has them, or --pickscore')
p.add_argument('--lrm', help="latent reward model in the layout of casiatao/LRM: folder or hub id/subfolder")
p.add_argument('--joint', action=argparse.BooleanOptionalAction, default=True,
               help='distil as well; no: preference updates only')
p.add_argument('--rl_ratio', type=int, default=5, help='preference updates after each distillation iteration')
p.add_argument('--rl_steps', choices=['high', 'all'], default='high',
               help="student steps s that get preference updates: those that lead to a high-noise step, or all but the last")
p.add_argument('--rl_lr', type=float, help="the student's learning rate in preference updates")
p.add_argument('--rl_prompts', default='', help='text file of prompts for preference updates; empty: the captions of --data')
p.add_argument('--candidates', type=int, default=4, help='K, next states drawn from each z_s')
p.add_argument('--beta', type=float, help='sharpness of the preference; log-probabilities are means over dimensions')
p.add_argument('--clamp', type=float, default=0., help='keep p / p_ref within 1 -+ this, as LPO and PSO do; 0: off')
p.add_argument('--critic_warmup', type=int,
               help='first iterations, for fake score and discriminator alone, where stage 1 does not hand them on')
# watching
p.add_argument('--eval_every', type=int, help='iterations between evaluations on the first --eval_n of --prompts; 0: none')
p.add_argument('--eval_n', type=int, default=128, help='prompts of an evaluation')
p.add_argument('--judge', help='CLIP for R-precision and CMMD, which the reward does not see')
p.add_argument('--pickscore', help='preference model on pixels, not trained on either')
p.add_argument('--real', help='real pictures for CMMD, as --data; empty: --data itself')
p.add_argument('--real_files', help='which files of --real')
first, _ = p.parse_known_args()
folder, facts = m.find_student(first.init, '--init', ['out/stage1'])
handed = Path(folder).parent / 'args.json'
try:
    handed = dict(json.loads(handed.read_text()) if handed.exists() else {})
except (OSError, ValueError, TypeError):
    m.die(f'--init: {handed} is damaged; delete it to go on with the settings of the recipe')
if (first.recipe or facts['recipe']) not in RECIPES:
    m.die(f"--init {folder}: its recipe is {facts['recipe']!r}; give --recipe {' or '.join(RECIPES)}")
recipe = first.recipe or facts['recipe']
if not first.init and recipe != facts['recipe']:
    m.die(f"--recipe {recipe}: the newest student, {folder}, is of recipe {facts['recipe']}; run train_stage1.py --recipe {recipe} "
          'first, or give --init')
own = {'recipe', 'iters', 'out', 'seed', 'student_lr', 'fake_lr', 'warmup', 'cooldown', 'save_every', 'sample_every',
       'log_every', 'wandb', 'shard', 'compile', 'timeout', 'disk_full', 't5', 'lora', 'lora_alpha', 'lora_targets'}        # not handed on
lora = facts.get('lora') or dict(rank=None, alpha=0., targets=['attention'])
p.set_defaults(**RECIPES[recipe] | (LORA_RATES.get(recipe, {}) if lora['rank'] else {}) | dict(
    model=facts['base_model'], steps=len(facts['steps']), t5=facts.get('t5'), lora=lora['rank'], lora_alpha=lora['alpha'],
    lora_targets=','.join(lora['targets'])))
handed = {k: v for k, v in handed.items() if k not in own and hasattr(first, k) and p.get_default(k) != v}
# read as flags, so that they are checked as those are
flags = [f'--{k}={v}' if not isinstance(v, bool) else f'--{k}' if v else f'--no-{k}' for k, v in handed.items() if v is not None]
args = p.parse_args(flags + sys.argv[1:])
args.recipe, args.init, args.init_iteration = recipe, str(folder), facts['iteration']
m.at_least(args, rl_ratio=1, candidates=2, critic_warmup=0, eval_every=0, eval_n=1, clamp=0, beta=0, rl_lr=0)
if args.clamp >= 1:
    m.die(f'--clamp {args.clamp} must be below 1')
if args.lora != lora['rank']:
    m.die(f'--lora: the student in {folder} ' + (f'is a LoRA of rank {lora["rank"]}' if lora['rank'] else 'is a full fine-tune')
          + ' and stays one; leave --lora and --no-lora away')

# ---------------------------------------------------------------------------------------------------------------------
# ranks and device, stage 1's networks as it left them, the latent reward, the reference

run = m.Run(args)
base = m.Base(args.model, device=run.device, dtype=torch.bfloat16 if run.cuda else torch.float32, t5=args.t5,
              offload=args.offload)
d = m.Distillation(base, run)
steps, student, fake = d.steps, d.student, d.fake
run.print(f'from {folder}, iteration {facts["iteration"]} on {args.model}:')
inherited = m.load_state(folder.parent, d.nets, d.opts, vars(args), '--init', inherit=True)
if 'student' not in inherited:
    m.restore_student(student, folder, d.lora)
    inherited = {'student'}
for name in d.nets:
    got = [what for what, file in [('weights', name), ('optimiser', f'{name}.opt')] if file in inherited]
    run.print(f'  {name}: {" and ".join(got) or "not there: new, " + ("the teacher" if name == "fake" else "random")}')
run.print('  settings: ' + (' '.join(f'--{k} {v}' for k, v in handed.items()) or "the recipe's"))
reference = m.twin(student, base.teacher.dtype).requires_grad_(False)       # p_ref, to the bit, so the first ratios are exactly 1
if args.reward == 'latent':
    lrm = m.load_latent_reward(args.lrm, base)

    def reward(z, t, prompts):
        """The latent reward of noisy latents z (B, C, h, w) at times t (B,): (B,)."""
        return lrm(z, t, lrm.encode(prompts))
else:
    try:
        source = args.pickscore if args.reward == 'pickscore' else R.SCORES[args.reward][1]
        judge_of_pictures = R.SCORES[args.reward][0](source, run.device)
    except R.Unavailable as error:
        m.die(f'--reward {args.reward}: {error}')

    def reward(z, t, prompts):
        """A reward of pictures for noisy latents z (B, C, h, w) at times t (B,): of the student's x0 there, decoded. (B,)."""
        y, out = base.encode(prompts), []
        for k in range(0, len(z), args.micro):                    # each takes 3.2 GB at 1024 px: bench.py --only memory
            part = slice(k, k + args.micro)
            with base.autocast():
                x = d.decode(base.x0(d.fast['student'], z[part], t[part], [v[part] for v in y]))
            out.append(judge_of_pictures.score((x.float() / 2 + .5).clamp(0, 1), prompts[part]))
        return torch.cat(out)

start = m.load_state(run.out, d.nets, d.opts, vars(args))
d.distribute()
fast_reference = d.compiled(reference)
rl_steps = [k for k in range(len(steps) - 1) if args.rl_steps == 'all' or k + 1 in d.high]
if not rl_steps:
    m.die(f'--rl_steps {args.rl_steps}: none of the steps {steps.long().tolist()} leads to a high-noise step; use --rl_steps '
          'all or more --steps')

# iterations: fake score and discriminator alone where they are new, then cycles of one distillation and rl_ratio preference
# updates
alone = 0 if {*d.nets} <= inherited or not args.joint else args.critic_warmup
cycle = args.rl_ratio + 1


def distils(it):
    return args.joint and (it < alone or (it - alone) % cycle == 0)


# ---------------------------------------------------------------------------------------------------------------------
# data, log

pictures = m.Pictures(args.data, args.data_files, args.image_column, args.text_column, base.size, args.seed)
loader = pictures.batches(args.batch, run.rank, run.world, filter(distils, range(start, args.iters)), args.workers)
rl_prompts = m.read_prompts(args.rl_prompts, '--rl_prompts') if args.rl_prompts else None


def texts(it):
    """This rank's prompts of a preference update."""
    if rl_prompts is None:
        return pictures.captions(it * args.batch + i for i in run.mine)
    return [d.choose(it, 3 + i, rl_prompts) for i in run.mine]


watched = m.read_prompts(args.prompts)
prompts, watched = watched[:8], watched[:args.eval_n]
grid_noise = m.draw(args.seed, 0, range(len(prompts)), (len(steps),) + base.latent_shape)[0].to(run.device)
run.open_log(start)
run.print(f'recipe {args.recipe}: {args.model} -> {run.out}, {run.world} x {run.device.type}, reward {args.lrm or args.reward}, '
          f'preference updates at {[int(steps[k]) for k in rl_steps]}, from iteration {start}'
          + f'; the first {alone} for fake score and discriminator alone' * (alone > start))
LINE = {'dm/': 'dm', 'fake': 'fake', 'gan/g': 'g', 'gan/d': 'd', 'rl/loss': 'rl', 'reward/': 'reward', 'rl/gap': 'gap',
        'rl/ratio': 'ratio'}

judges = {}
for name, network in [('judge', R.Clip), ('pickscore', R.PickScore)] if args.eval_every else ():
    try:
        judges[name] = judge_of_pictures if name == args.reward else network(vars(args)[name], run.device)
    except R.Unavailable as error:
        run.print(f'--{name}: {error}; its columns are left out')
if 'judge' in judges and run.master:
    real = m.Pictures(args.real or args.data, args.real_files if args.real else args.data_files, args.image_column,
                      args.text_column, base.size, args.seed, '--real')
    real = torch.cat([judges['judge'].embed_images(real[i]['pixels'][None] / 2 + .5).cpu()
                      for i in range(min(512, len(real.rows)))])
    hard = Path(args.prompts).with_suffix('.hard.txt')
    hard = [x.split('\t') for x in m.read_prompts(hard)] if hard.exists() else [[]] * len(watched)


def judges_to(device):
    """The evaluations' networks wait in main memory while the run trains, but for one that is the reward."""
    for name, judge in judges.items():
        if name != args.reward:
            judge.clip.to(device)


judges_to('cpu')


@torch.no_grad()
def evaluate(it):
    """The latent reward, which is trained on, and what is not, on the student's pictures of `watched`: one JSON line in
    eval.jsonl. Every rank draws its share."""
    judges_to(run.device)
    found, mine, t = {}, list(range(run.rank, len(watched), run.world)), steps[-1]
    for k in range(0, len(mine), args.micro):
        part, texts = mine[k:k + args.micro], [watched[i] for i in mine[k:k + args.micro]]
        noise = m.draw(args.seed, 1, part, (len(steps) + 1,) + base.latent_shape)[0].to(run.device)
        z = m.backward_simulation(base, student, steps, noise, base.encode(texts))
        x = (base.decode(z) / 2 + .5).clamp(0, 1)                                                        # (b, 3, H, W)
        z_t = base.schedule.noised(z, noise[:, -1], t.expand(len(part)))
        row = dict(reward=reward(z_t, t.expand(len(part)), texts), brightness=x.mean((1, 2, 3)),
                   saturation=(x.amax(1) - x.amin(1)).mean((1, 2)))
        if 'pickscore' in judges:
            row['pickscore'] = judges['pickscore'].score(x, texts)
        v = judges['judge'].embed_images(x).cpu() if 'judge' in judges else x[:, :0]
        found |= {i: ({name: value[j].item() for name, value in row.items()}, v[j:j + 1]) for j, i in enumerate(part)}
    found = run.gathered(found)
    if run.master:
        row = dict(iteration=it) | {k: sum(found[i][0][k] for i in range(len(watched))) / len(watched) for k in found[0][0]}
        if 'judge' in judges:
            v = torch.cat([found[i][1] for i in range(len(watched))])                                        # (n, D)
            row['rprecision'] = R.r_precision(judges['judge'], v, range(len(v)), watched, hard, args.seed).mean().item()
            row['cmmd'] = R.cmmd(v, real)
        run.print(f'{it:5d}/{args.iters}  evaluation  ' + '  '.join(f'{k} {v:.4f}' for k, v in row.items() if k != 'iteration'))
        with (run.out / 'eval.jsonl').open('a') as file:
            file.write(json.dumps(row) + '\n')
    judges_to('cpu')


# ---------------------------------------------------------------------------------------------------------------------
# the loop

for it in range(start, args.iters + 1):
    last = it == args.iters
    stop = run.told_to_stop(it) or last
    if run.master and args.sample_every and (it % args.sample_every == 0 or last):
        row_of = lambda net: base.decode(m.backward_simulation(base, net, steps, grid_noise, base.encode(prompts)))
        with torch.no_grad():
            m.picture_grid([row_of(reference), row_of(student)], prompts, run.out / f'samples-{it:07d}.png',
                           ['stage 1', 'stage 2'])
    if args.eval_every and (it % args.eval_every == 0 or last):
        evaluate(it)
    if it > start and (it % args.save_every == 0 or stop) or last:
        d.save(it, dict(prompts=prompts), stop)
    if stop:
        break

    if distils(it):                                                    # one iteration of stage 1, described there
        d.learning_rates(it)
        turn = it >= alone and (it - alone) // cycle % args.ttur == 0
        rows = next(loader)
        run.skipped += int(rows['skipped'].sum())
        parts = d.parts(it, rows['text'], rows['pixels'])
        for part in parts:
            d.student_backward(part, it, turn, 1 / len(parts))
        sizes = [m.update(d.opts['student'], student)] if turn else []
        if turn and sizes[0] is not None:
            m.couple(fake, student, args.couple)
        for part in parts:
            d.critic_backward(part, it, 1 / len(parts))
        run.count(it, sizes + [m.update(d.opts[name], d.nets[name]) for name in d.nets if name != 'student'])
    else:
        # one preference update of the student
        d.learning_rates(it, student=args.rl_lr)
        s = d.choose(it, 1, rl_steps)
        parts = d.parts(it, texts(it), extra=args.candidates)
        next_t = steps[s + 1:s + 2]                                                                  # s'
        a, sigma = d.schedule.alpha(next_t), d.schedule.sigma(next_t)
        for part in parts:
            with d.sync('student', part.last):
                z_s, t = d.reach(part, s)
                x0 = d.G(z_s, t, part.y)                                                              # (b, C, h, w)
                with torch.no_grad():
                    x_ref = base.x0(fast_reference, z_s, t, part.y)
                    z = a * x0[:, None] + sigma * part.eps[:, len(steps):]                            # (b, K, C, h, w)
                    texts_k = [text for text in part.texts for _ in range(args.candidates)]
                    r = reward(z.flatten(0, 1), next_t.expand(len(texts_k)), texts_k).view(z.shape[:2])      # (b, K)
                    w, l = (z[torch.arange(len(z)), k] for k in (r.argmax(1), r.argmin(1)))           # (b, C, h, w)
                    sound = r.isfinite().all(1)                        # a group with a NaN among its rewards teaches nothing
                # log p(w) / p_ref(w) - log p(l) / p_ref(l): both have the mean alpha' x0, so the squares cancel and what is
                # left is linear in x0
                H = (a * (x0 - x_ref) * (w - l) / sigma ** 2).mean((1, 2, 3))                         # (b,), 0 at first
                if args.clamp:
                    bounds = math.log(1 - args.clamp), math.log(1 + args.clamp)
                    h_w, h_l = (m.log_ratio(x, x0, x_ref, a, sigma).clamp(*bounds) for x in (w, l))
                    H = h_w - h_l
                loss = torch.where(sound, -F.logsigmoid(args.beta * H), 0.).mean()
                (loss / len(parts)).backward()
            run.note('rl/loss', loss), run.note('rl/ratio', H.exp().mean()), run.note('rl/unsound', (~sound).float().mean())
            r = r.masked_fill(~sound[:, None], 0.)
            run.note(f'reward/{int(steps[s])}', r.mean()), run.note('rl/gap', (r.amax(1) - r.amin(1)).mean())
        run.count(it, [m.update(d.opts['student'], student)])

    if (it + 1) % args.log_every == 0:
        run.report(it + 1, LINE)

run.close(it)
