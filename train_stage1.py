"""
Flash-DMD, stage 1: a many-step teacher becomes a few-step student. Per iteration (arXiv 2511.20549, algorithm 1):

    high noise   x0 = G(x_s), s by backward simulation       DM loss, eq. 4: teacher's score against the fake score
    low noise    x0 = G(x_249), decoded to pixels            pixel GAN, eq. 8-9: heads on a frozen SAM encoder
    always       fake score: diffusion loss on G's samples, eq. 6, and pulled towards G after its update, eq. 11
                 discriminator heads: hinge on real against generated pictures

    python train_stage1.py                                  # CUDA: SDXL; else: the toy, 5 minutes on a laptop
    torchrun --nproc_per_node=8 train_stage1.py             # 8 GPUs, the same result
    python train_stage1.py --gan latent --no-split --ttur 5 --couple 1 --out out/dmd2      # DMD2, for comparison

Running the same command again resumes. out/stage1 gets state-*/ (everything), student/ (a diffusers pipeline), log.jsonl,
samples-*.png, curves.png.
"""

import argparse
import contextlib
import json
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import model as m

began = time.time()

# ---------------------------------------------------------------------------------------------------------------------
# settings: a recipe is a column of defaults, and every flag overrides its entry. SDXL's learning rates, GAN weight and
# guidance are not in the paper and nobody has tuned them here: DMD2's and SenseFlow's neighbourhood

RECIPES = {
    'sdxl': dict(
        model='stabilityai/stable-diffusion-xl-base-1.0', sam='vit_b', data='jackyhate/text-to-image-2M',
        data_files='data_1024_10K/*.tar', image_column='jpg', text_column='json.prompt', prompts='assets/prompts.txt',
        batch=64, micro=1, iters=1000, student_lr=1e-6, fake_lr=1e-6, heads_lr=1e-4, warmup=50, cooldown=0, cfg=8.,
        gan_weight=1e-2, checkpointing=True, save_every=250, sample_every=250, log_every=1),
    # tuned on seed 0 by `python evaluate.py`, R-precision / CMMD; the teacher has 87.5 % / .096, its weights as a student
    # untrained 63.7 % / .194. Student and fake lr 1e-4, 4e-4, CFG 3, 300 iterations with cool-down (these): 83.6 / .087;
    # 250 without: 83.6 / .084. 5e-5, 2e-4, no cool-down: 82.8 / .086 with CFG 4 and 81.2 / .069 with CFG 2.5 at 250,
    # 78.5 / .082 with CFG 3 at 400, it had begun to drift. No GAN, 1e-4, 3e-4, 250: 76.6 / .117. Real pictures sent
    # through the VAE, so that the heads cannot go by its blur (real_view as decode(latents(pixels)), not kept):
    # 80.9 / .094 against 82.8 / .086. gan_weight .1 makes |dGAN| .5 to 1 of |dDM|, .01 made it .04
    'toy': dict(
        model='assets/toy/sdxl', sam='assets/toy/sam.pth', data='assets/toy/data', data_files='train.parquet',
        image_column='image', text_column='text', prompts='assets/toy/data/prompts.txt',
        batch=16, micro=16, iters=300, student_lr=1e-4, fake_lr=4e-4, heads_lr=2e-4, warmup=30, cooldown=100, cfg=3.,
        gan_weight=.1, checkpointing=False, save_every=100, sample_every=100, log_every=10),
}

p = m.parser(__doc__)
p.add_argument('--recipe', choices=RECIPES, default='sdxl' if torch.cuda.is_available() else 'toy', help='table of defaults')
# what to distil, from what
p.add_argument('--model', help='teacher: a StableDiffusionXLPipeline folder or hub id')
p.add_argument('--sam', help='segment_anything checkpoint, or vit_b, vit_l, vit_h (downloaded)')
p.add_argument('--data', help='captioned pictures: hub id, folder, .parquet or webdataset .tar')
p.add_argument('--data_files', help='which files of --data, a pattern; empty: all')
p.add_argument('--image_column', help='column of the pictures')
p.add_argument('--text_column', help='column of the captions; a dot reaches into a nested one')
p.add_argument('--prompts', help='text file; its first 8 lines are drawn in the sample grids')
p.add_argument('--workers', type=int, default=2, help='data decoding processes per rank; 0: the main process')
# method
p.add_argument('--steps', type=int, default=4, help="the student's sampling steps")
p.add_argument('--cfg', type=float, help="guidance of the teacher's score, uncond + w (cond - uncond)")
p.add_argument('--gan', choices=['pixel', 'latent', 'none'], default='pixel',
               help="pixel: SAM on decoded pictures; latent: DMD2's, on the fake score's bottleneck")
p.add_argument('--gan_weight', type=float, help="weight of the generator's adversarial loss")
p.add_argument('--gan_crop', type=int, default=0, help='pixels a side of the random crop that is decoded for the GAN; 0: all')
p.add_argument('--split', action=argparse.BooleanOptionalAction, default=True,
               help='DM loss at high noise and GAN at low noise only; no: both at every step')
p.add_argument('--ttur', type=int, default=1, help='iterations of fake score and discriminator per student update')
p.add_argument('--couple', type=float, default=.97, help='c in fake <- c fake + (1 - c) student; 1: off')
# optimisation
p.add_argument('--iters', type=int, help='iterations')
p.add_argument('--batch', type=int, help='prompts per iteration, over all ranks')
p.add_argument('--micro', type=int, help='prompts per forward on one rank; gradients accumulate')
p.add_argument('--student_lr', type=float, help='AdamW learning rate of the student')
p.add_argument('--fake_lr', type=float, help='AdamW learning rate of the fake score')
p.add_argument('--heads_lr', type=float, help='AdamW learning rate of the discriminator heads')
p.add_argument('--warmup', type=int, help='iterations of linear learning-rate warm-up')
p.add_argument('--cooldown', type=int, help='last iterations, over which the learning rates fall linearly to 0')
p.add_argument('--checkpointing', action=argparse.BooleanOptionalAction, help='gradient checkpointing in all networks')
p.add_argument('--seed', type=int, default=0, help='seed of the run')
# output
p.add_argument('--out', default='out/stage1', help='folder of the run; holds its state, so the same command resumes')
p.add_argument('--save_every', type=int, help='iterations between saves')
p.add_argument('--save_dtype', choices=['float16', 'bfloat16', 'float32'], default='float16', help="of student/'s weights")
p.add_argument('--sample_every', type=int, help='iterations between sample grids; 0: none')
p.add_argument('--log_every', type=int, help='iterations between log lines')
p.add_argument('--wandb', default='', help='Weights & Biases project to log to as well; empty: none')
first, _ = p.parse_known_args()
p.set_defaults(**RECIPES[first.recipe])
if first.gan == 'latent':
    p.set_defaults(gan_weight=5e-3)                                                              # DMD2's
args = p.parse_args()

# ---------------------------------------------------------------------------------------------------------------------
# processes and devices

rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in [('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)])
cuda = torch.cuda.is_available()
device = torch.device('cuda', local_rank) if cuda else torch.device('cpu')
master = rank == 0
print0 = print if master else lambda *a, **k: None
m.at_least(args, batch=1, micro=1, iters=1, steps=1, ttur=1, save_every=1, log_every=1, sample_every=0, warmup=0,
           cooldown=0, workers=0, seed=0, gan_crop=0, couple=0)
if args.couple > 1:
    m.die(f'--couple {args.couple} must be at most 1')
if args.batch % (world * args.micro):
    m.die(f'--batch {args.batch} is not a multiple of {world} ranks x --micro {args.micro}; '
          f'change --batch to {max(1, args.batch // max(1, world * args.micro)) * world * args.micro} or lower --micro')
out = m.writable_folder(args.out, '--out')
if cuda:
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision('high')
if world > 1:
    dist.init_process_group('nccl' if cuda else 'gloo', timeout=timedelta(hours=1))       # rank 0 saves meanwhile
torch.manual_seed(args.seed)                               # the heads' initial weights; all else has streams of its own

# ---------------------------------------------------------------------------------------------------------------------
# networks

base = m.Base(args.model, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
schedule, steps = base.schedule, base.schedule.steps(args.steps).to(device)                           # (S,)
low = [k for k in range(len(steps)) if schedule.low_noise(steps[k:k + 1])]
high = [k for k in range(len(steps)) if k not in low]
if args.split and not (low and high):
    m.die(f'--steps {args.steps} gives {steps.long().tolist()}, none of them at {"low" if high else "high"} noise; '
          'use --no-split or more steps')
student, fake = base.trainable(), base.trainable()
heads = None
if args.gan == 'pixel':
    heads = m.PixelDiscriminator(*m.load_sam_encoder(args.sam), base.size, args.checkpointing).to(device)
elif args.gan == 'latent':
    heads = m.Head(student.config.block_out_channels[-1]).to(device)
if args.checkpointing:
    for net in (student, fake, base.vae):
        net.enable_gradient_checkpointing()
scale = base.pipe.vae_scale_factor
if args.gan_crop % scale or args.gan_crop > base.size or args.gan_crop < 0:
    m.die(f'--gan_crop {args.gan_crop} must be a multiple of {scale} up to {base.size}, or 0')
side = (args.gan_crop or base.size) // scale                                                # of the decoded latents

nets = {'student': student, 'fake': fake} | ({'heads': heads} if heads else {})
rates = {'student': args.student_lr, 'fake': args.fake_lr, 'heads': args.heads_lr}
opts = {k: torch.optim.AdamW([w for w in net.parameters() if w.requires_grad], lr=rates[k], betas=(.9, .999),
                             weight_decay=.01, fused=cuda) for k, net in nets.items()}
start = m.load_state(out, nets, opts, vars(args))
wrapped = {k: DDP(net, device_ids=[local_rank] if cuda else None, broadcast_buffers=False) if world > 1 else net
           for k, net in nets.items()}


def sync(name, last):
    """Gradients of a network are averaged over ranks in its last backward of an iteration; wraps forward and backward."""
    return contextlib.nullcontext() if last or world == 1 or name not in wrapped else wrapped[name].no_sync()


# ---------------------------------------------------------------------------------------------------------------------
# data, log

pictures = m.Pictures(args.data, args.data_files, args.image_column, args.text_column, base.size, args.seed)
loader = iter(pictures.batches(args.batch, rank, world, start, args.iters, args.workers))
mine = range(rank * args.batch // world, (rank + 1) * args.batch // world)                    # this rank's samples
accumulate = len(mine) // args.micro
prompts = m.read_prompts(args.prompts)[:8]
grid_noise = m.draw(args.seed, 0, range(len(prompts)), (len(steps),) + base.latent_shape)[0].to(device)
teacher_row = base.teacher_samples(prompts, grid_noise[:, 0], 50, args.cfg) if master and args.sample_every else None

log = out / 'log.jsonl'
if master:
    # a killed run logs beyond its last save, and perhaps half a line
    old = [x for x in log.read_text().splitlines() if x.endswith('}')] if start and log.exists() else []
    log.write_text(''.join(x + '\n' for x in old if json.loads(x)['iteration'] <= start))
    (out / 'args.json').write_text(json.dumps(vars(args), indent=1))
    if args.wandb:
        import wandb
        wandb.init(project=args.wandb, config=vars(args))
print0(f'recipe {args.recipe}: {args.model} -> {out}, {world} x {device.type}, '
       f'student {sum(w.numel() for w in student.parameters()) / 1e6:.1f} M parameters, {len(pictures.rows)} pictures')
print0(f'steps {steps.long().tolist()}, SNR {[round(v, 3) for v in schedule.snr(steps).tolist()]}, batch {args.batch} = '
       f'{world} ranks x {accumulate} x {args.micro}, from iteration {start}')

meter, in_a_row, dropped, skipped, clock = {}, 0, 0, 0, time.time()


def note(name, value):
    """Adds a tensor, which stays on the device, to the mean of `name` in the next log line."""
    meter.setdefault(name, []).append(torch.as_tensor(value, device=device, dtype=torch.float32).detach())


def report(it):
    """One line to read, one JSON line to plot; the only place where metrics leave the device."""
    global clock
    names = sorted(meter)
    values = torch.stack([torch.stack(meter[k]).mean() for k in names] + [torch.tensor(float(skipped), device=device)])
    if world > 1:
        dist.all_reduce(values)
        values /= world
    now = time.time()
    row = dict(iteration=it) | dict(zip(names, values.tolist())) | dict(
        seconds=(now - clock) / args.log_every, dropped=dropped, skipped=round(values[-1].item() * world),
        memory=torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else 0.)
    clock = now
    meter.clear()
    if master:
        dm = ' '.join(f'{row[k]:.4f}@{k[3:]}' for k in names if k.startswith('dm/'))
        text = ''.join(f'  {label} {row[k]:.4f}' for k, label in [
            ('fake', 'fake'), ('gan/g', 'g'), ('gan/d', 'd'), ('grad/dm', '|dDM|'), ('grad/gan', '|dGAN|')] if k in row)
        print(f'{it:5d}/{args.iters}  dm {dm}{text}  {row["seconds"]:.2f} s/it', flush=True)
        with log.open('a') as file:
            file.write(json.dumps(row) + '\n')
        if args.wandb:
            wandb.log(row, step=it)


# ---------------------------------------------------------------------------------------------------------------------
# the discriminator's view: pixels of a crop, or noised latents through the fake score's bottleneck

def crop(x, it, unit):
    """The crop of iteration `it` (the same on every rank) of latents, unit = 1, or of pixels, unit = scale."""
    top, left = torch.randint(base.size // scale - side + 1, (2,), generator=m.generator(args.seed, it, 2 ** 31)).tolist()
    return x[..., top * unit:(top + side) * unit, left * unit:(left + side) * unit]


def judge(net, seen, eps, t, y):
    """Logits for what view() or real_view() returned."""
    if args.gan == 'pixel':
        with base.autocast():
            return net(seen).float()
    return net(m.bottleneck(base, fake, schedule.noised(seen, eps, t), t, y))


def view(z, it):
    with base.autocast():
        return base.decode(crop(z, it, 1)) if args.gan == 'pixel' else z


def real_view(pixels, it):
    return crop(pixels, it, scale) if args.gan == 'pixel' else base.latents(pixels)


d_loss, g_loss = m.gan_losses(args.gan)
# DMD2's latent critic is the fake score itself, so its loss enters the fake score's update with a small weight
critic_weight = 1. if args.gan == 'pixel' else 1e-2

# ---------------------------------------------------------------------------------------------------------------------
# the loop

for it in range(start, args.iters + 1):
    last = it == args.iters
    if master and args.sample_every and (it % args.sample_every == 0 or last):
        with torch.no_grad():
            y = base.encode(prompts)
            row = base.decode(m.backward_simulation(base, student, steps, grid_noise, y))
        m.picture_grid([teacher_row, row], prompts, out / f'samples-{it:07d}.png',
                       ['teacher\n50 steps', f'student\n{len(steps)} steps'])
    if master and (it % args.save_every == 0 and it > start or last):
        m.save_state(out, it, nets, opts, vars(args))
        m.save_student(out / 'student', base, student, steps, getattr(torch, args.save_dtype),
                       dict(base_model=args.model, recipe=args.recipe, iteration=it, prompts=prompts))
    if last:
        break

    for opt, lr in zip(opts.values(), rates.values()):
        for group in opt.param_groups:
            group['lr'] = lr * min(1., (it + 1) / max(1, args.warmup), (args.iters - it) / max(1, args.cooldown))
    turn = it % args.ttur == 0                                                             # of the student to learn
    choose = m.generator(args.seed, it, 2 ** 31 + 1)
    pool = high if args.split else range(len(steps))
    s = pool[torch.randint(len(pool), (1,), generator=choose).item()]                     # one student step for all ranks
    l = low[torch.randint(len(low), (1,), generator=choose).item()] if low else s
    rows = next(loader)
    skipped += int(rows['skipped'].sum())
    S = len(steps)
    normals, uniforms = m.draw(args.seed, it, mine, (S + 5,) + base.latent_shape)
    kept = []

    # the student, micro-batch by micro-batch
    for k in range(accumulate):
        part, final = slice(k * args.micro, (k + 1) * args.micro), k == accumulate - 1
        y = base.encode(rows['text'][part])
        eps, u = normals[part].to(device), uniforms[part].to(device)                         # (b, S + 5, C, h, w), (b, 4)
        with sync('student', final), torch.set_grad_enabled(turn):
            G = wrapped['student'] if turn else student

            # 1. its sample at step s, reached as at inference
            with torch.no_grad():
                before = m.backward_simulation(base, student, steps, eps, y, stop=s)
            x0 = z = base.x0(G, *m.at_step(base, steps, eps, s, before), y)                             # (b, C, h, w)

            # 2. distribution matching: teacher's against fake score at a random noise level
            if turn:
                tau = schedule.between(u[:, 0], 20, 980)
                x_tau = schedule.noised(x0.detach(), eps[:, S], tau)
                with torch.no_grad():
                    r = base.x0(base.teacher, x_tau, tau, y, args.cfg)
                    f = base.x0(fake, x_tau, tau, y)
                dm, d_dm = m.slope(lambda x: m.dm_loss(x, r, f), x0)                                    # loss, dDM/dx0
                note(f'dm/{int(steps[s])}', dm), note('grad/dm', m.sample_norm(d_dm))

            # 3. pixel GAN: finish the picture without gradient, noise it to a low-noise step, clean it once with gradient
            if args.gan != 'none' and args.split:
                with torch.no_grad():
                    end = m.backward_simulation(base, student, steps, eps, y, first=s + 1, x0=x0)
                    t_l = steps[l].expand(len(end))
                    x_l = schedule.noised(end, eps[:, S + 1], t_l)
                z = base.x0(G, x_l, t_l, y)                                                             # (b, C, h, w)
            if args.gan != 'none':
                leaf = z.detach().requires_grad_(turn)                   # the discriminator gets no gradient, only its input
                seen = view(leaf, it)                                                          # pixels (b, 3, H, W)
            if args.gan != 'none' and turn:
                adv = g_loss(judge(heads, seen, eps[:, S + 2], schedule.between(u[:, 1], 0, 999), y))
                d_adv, = torch.autograd.grad(adv, leaf)                                                 # dAdv/dz
                note('gan/g', adv), note('grad/gan', m.sample_norm(d_adv) * args.gan_weight)

            # 4. L = L_DM + gan_weight L_adv, through the one or two student forwards
            if turn and args.gan != 'none':
                torch.autograd.backward([x0, z], [d_dm / accumulate, d_adv * args.gan_weight / accumulate])
            elif turn:
                x0.backward(d_dm / accumulate)
        kept.append((part, y, eps, u, x0.detach(), seen.detach() if args.gan != 'none' else None))

    if turn:
        size = m.update(opts['student'], student)
        note('norm/student', size or 0.)
        if size is not None:
            m.couple(fake, student, args.couple)

    # 5. the fake score learns the student's samples, 6. the discriminator tells real from generated
    for part, y, eps, u, x0, seen in kept:
        final = part.stop == len(mine)
        with sync('fake', final), sync('heads', final):
            loss = m.diffusion_loss(base, wrapped['fake'], x0, eps[:, S + 3], schedule.between(u[:, 2], 0, 999), y)
            note('fake', loss)
            if args.gan != 'none':
                both = torch.cat([real_view(rows['pixels'][part].to(device), it), seen])
                t_d = schedule.between(u[:, 3], 0, 999).repeat(2)
                real, made = judge(wrapped['heads'], both, torch.cat([eps[:, S + 4], eps[:, S + 2]]), t_d,
                                   [torch.cat([a, a]) for a in y]).chunk(2)
                d = d_loss(real, made)
                loss = loss + critic_weight * d
                note('gan/d', d), note('gan/real', real.mean()), note('gan/made', made.mean())
            (loss / accumulate).backward()
    sizes = ([size] if turn else []) + [m.update(opts[name], nets[name]) for name in nets if name != 'student']
    in_a_row = in_a_row + 1 if None in sizes else 0
    dropped += None in sizes
    if in_a_row == 10:
        m.die(f'10 iterations in a row had a non-finite gradient, up to {it}; the last save in {out} is good: lower the '
              'learning rates or --gan_weight and run again')

    if (it + 1) % args.log_every == 0:
        report(it + 1)

if master:
    m.curves(log, out / 'curves.png')
    print(f'done: {out / "student"} after {args.iters} iterations, {(time.time() - began) / 60:.1f} minutes, '
          f'{dropped} iterations with a dropped update, {skipped} pictures skipped; python sample.py --ckpt {out}')
if world > 1:
    dist.destroy_process_group()
