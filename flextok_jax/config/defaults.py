"""The default of every field of a config, with its unit and source; ranges.py has the values that it may have.

Sources: [paper] FlexTok, arXiv 2502.13967; [code] the public inference code; [video] the sibling video tokenizer,
arXiv 2604.12887; [LDM] latent diffusion, Rombach et al. 2022, and its code; [taming] Esser et al. 2021, and its code;
[ours] not in the public record: our choice, with the reason.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the base configuration: FlexTok d12-d12 on ImageNet at 256 px."""
  c = ConfigDict()
  # "tokenizer" (frozen VAE), "vae", "ar" (generator of token ids), or "distill" (few-step decoder of a tokenizer).
  c.stage = "tokenizer"
  c.seed = 0  # initialisation, data order, noise
  c.image_size = 256  # pixels; height = width [paper]
  # Compute dtype; parameters, norms, softmax, FSQ and losses are float32. Devices sum gradients in the dtype in which
  # they are computed, so those of the blocks' matrices in this one; optim.accumulate_steps sums in float32.
  c.dtype = "bfloat16"
  c.fast = True  # exact optimizations: merged masked tokens, buckets, ...; False: the slow reference path
  c.attention = "auto"  # implementation: "auto", "xla", "cudnn" (GPU), "pallas" (TPU)
  # Rematerialization in the blocks: "none"; "dots": recompute all but the products with weights; "full": recompute
  # everything, for about a third more FLOPs.
  c.remat = "none"
  # (start, stop): profile the steps start to stop - 1, for TensorBoard or Perfetto, into workdir/profile.
  c.profile_steps = ()
  # Weights to start from (a workdir, WORKDIR/checkpoints/STEP or a .safetensors file): its top-level parts are used.
  c.init_from = ""

  c.vae = ConfigDict()
  c.vae.kind = "autoencoder_kl"  # or "pixels": no VAE, latents are the scaled image
  c.vae.latent_channels = 16  # 4, 8 or 16 [paper]; ignored for "pixels" (3)
  c.vae.block_out_channels = (128, 256, 512, 512)  # 8x down: stride 2 after each level but the last [code]
  c.vae.layers_per_block = 2  # residual blocks per level of the encoder; the decoder has one more [code]
  c.vae.norm_groups = 32  # [code]
  # latents = scaling_factor * posterior sample or mode [code: a field; value ours]. 0: 1 / standard deviation of the
  # latents [LDM], which stage "vae" measures and stores in its checkpoints and "tokenizer" reads from init_from.
  c.vae.scaling_factor = 0.18
  c.vae.sample_posterior = True  # in training; evaluation uses the mode [code]
  c.vae.dtype = "float32"  # compute dtype of the VAE, float32 even if the rest is not [code]
  # Pixels per side above which images are encoded and decoded in tiles, of at most this size with their overlap, to
  # save memory; 0: never. No gradient passes through tiles, and stage "vae" has none (docs/vae.md).
  c.vae.tile = 0

  c.encoder = ConfigDict()
  c.encoder.width = 768  # 64 * depth [paper]
  c.encoder.depth = 12
  c.encoder.head_dim = 64  # [paper]
  c.encoder.patch_size = 2  # latent pixels per side [paper]
  c.decoder = ConfigDict()
  c.decoder.width = 768
  c.decoder.depth = 12
  c.decoder.head_dim = 64
  c.decoder.patch_size = 2
  for part in (c.encoder, c.decoder):  # values of the released models [code]
    part.mlp_ratio = 4.0  # hidden width / width; two thirds of it in a gated MLP
    part.gated_mlp = True  # W2(act(W1 x) * W3 x); False: W2(act(W1 x))
    part.activation = "silu"  # "silu", "gelu" (exact), "gelu_tanh", "relu" or "quick_gelu"
    part.qk_norm = True  # layer-norms queries and keys, per head
    part.qkv_bias = False
    part.out_bias = False  # of attention's output projection
    part.mlp_bias = False
    # Positions of the patches: "sincos" (fixed), or learned row and column vectors, added ("learnable_sum") or
    # multiplied ("learnable_prod"). "sincos_released": as the released code arranges a table that is not square.
    part.posemb = "sincos"
    # How a grid uses the table of max_grid rows and max_grid_width columns. "absolute": its corner, and no grid may be
    # larger; "interpolate": all of it, resized bilinearly; "scaled", of "sincos" alone: positions from 0 to 1 over the
    # grid, times those of the last row and the last column [ours: the same as absolute for a grid of the table's size].
    part.posemb_scaling = "absolute"
    part.max_grid = 0  # patches per side, or per column; 0: those of image_size
    part.max_grid_width = 0  # patches per row; 0: max_grid
    part.head_bias = True  # of the output projection
    part.readout_multiplier = 1.0  # factor on the input of the output projection (muP)
  c.decoder.modulation = "per_segment"  # separate adaLN for patches and registers; "shared": one for both [paper]
  c.decoder.head_modulation = True  # adaLN before the output projection
  c.decoder.head_modulation_bias = True
  c.decoder.code_bias = True  # of the embedding of the codes
  c.decoder.max_timestep = 1.0  # unit of time: its features have the frequencies 1000 / max_timestep * 256^(-j/128)
  # Without condition, every register is the learned null token ("learned") or zero ("zero"), or a single null token
  # replaces them all ("single").
  c.decoder.null_condition = "learned"
  c.decoder.interval = False  # True: a student of stage "distill", which also sees how long an interval it crosses

  c.tokens = ConfigDict()
  # "registers": ordered tokens, of the encoder's registers [paper]; "grid": the 2D baseline, a token for each patch of
  # the encoder, row by row.
  c.tokens.layout = "registers"
  c.tokens.num_registers = 256  # most tokens per image [paper]; of a grid, its patches
  c.tokens.levels = (8, 8, 8, 5, 5, 5)  # FSQ levels: 64,000 codes [paper]
  # Distribution of the number of kept tokens: "uniform" on 1..N; "pow2": uniform over the powers of two [paper];
  # "uniform_pow2": a uniform length rounded up to a power of two, so about half of the samples keep all; "none": all.
  c.tokens.nested_dropout = "pow2"
  # What the decoder has in place of dropped registers: the learned mask token ("token") [code], or nothing: attention
  # leaves them out ("attention").
  c.tokens.mask = "token"
  c.tokens.saturation_weight = 0.0  # penalty on encoder outputs beyond [-1, 1], where FSQ's tanh saturates [ours]
  # Kept lengths are stratified over groups of this many rows of the batch, or of its next smaller divisor. Rows of
  # similar lengths run together; best if the rows per device are a multiple of it.
  c.tokens.bucket_rows = 16
  c.tokens.null_prob = 0.2  # fraction of samples trained without condition, for guidance [code]
  # In training: fraction of samples whose codes are bounded but not rounded; fraction of tokens, drawn independently,
  # replaced by a uniformly drawn code. Both off in the released models [code].
  c.tokens.quantization_dropout = 0.0
  c.tokens.corruption = 0.0

  c.flow = ConfigDict()
  c.flow.t_sampling = "mode"  # "logit_normal", "stratified_logit_normal", "uniform", "mode" (SD3) [code]
  c.flow.mode_scale = 0.25  # s of SD3's mode sampling [code]
  c.flow.t_shift = 1.0  # above 1: more noise in training, t <- shift t / (1 + (shift - 1) t) [SD3]
  # Pixels per side of images whose times are as above; those of images of n times as many latents are shifted further,
  # by sqrt(n), in training and in the sampler [SD3]. 0: times do not depend on the size.
  c.flow.base_size = 0

  # REPA (Yu et al. 2024, arXiv 2410.06940), in stage "tokenizer": aligns a projection of the decoder's patches with the
  # features of a frozen DINOv2 for the clean image. The projector is only needed in training.
  c.repa = ConfigDict()
  c.repa.weight = 0.0  # weight of the loss, the mean over patches of -cos; 0: off, without a projector [paper: 1.0]
  c.repa.block = 1  # uses the decoder's patches after this block, counted from 1 [paper]
  c.repa.hidden = 2048  # width of the projector, of three layers [REPA's code]
  c.repa.teacher = "facebook/dinov2-large"  # folder with config.json and weights, or a hub repository [paper]
  c.repa.features = 1024  # width of the teacher's features
  # Patches per side of the teacher's features; its images are resized to that many of its patches. A grid other than
  # the decoder's is resized to it bilinearly. 0: that of the decoder.
  c.repa.grid = 0
  c.repa.dtype = "bfloat16"  # of the teacher: parameters and products [ours]

  c.sampler = ConfigDict()
  c.sampler.num_steps = 25  # Euler steps [paper]
  c.sampler.guidance = "apg"  # "apg", "cfg" or "none"
  c.sampler.guidance_scale = 7.5  # with APG [paper]
  c.sampler.guidance_interval = (0.0, 1.0)  # times t at which guidance is applied
  c.sampler.apg_momentum = -0.5  # [code]
  c.sampler.apg_eta = 0.0  # weight of the part parallel to the conditional velocity [code]
  c.sampler.apg_threshold = 2.5  # bound on the L2 norm of the guidance direction, per sample; 0 is off [code]

  c.distill = ConfigDict()  # of stage "distill"
  c.distill.steps = (1, 2, 4, 8)  # numbers of steps that the student learns; each image gives an interval of each
  # The sampler of the teacher's paths and their fingerprint (weights/fingerprints.py); training takes both from
  # init_from.
  c.distill.sampler = ConfigDict(c.sampler.to_dict())
  c.distill.teacher = ""

  c.ar = ConfigDict()  # of stage "ar"
  c.ar.width = 768
  c.ar.depth = 12
  c.ar.head_dim = 64  # [paper]
  c.ar.num_ids = 64_000  # token ids: the tokenizer's codes [paper]
  c.ar.num_tokens = 256  # most tokens per image [paper]
  c.ar.condition = "class"  # "class" (added to the start vector), "text" (cross-attention in every block) or "none"
  c.ar.num_classes = 1000
  c.ar.class_names = ()  # of the classes from 0 on; training takes them from the shards
  # True: an additional id ends a sequence; train on shards with lengths (python -m flextok_jax.tokenize --quality).
  c.ar.stop = False
  # The block. That of the released models is not in the public record; this is a LLaMA-like one [ours].
  c.ar.norm = "rmsnorm"  # "rmsnorm" or "layernorm"
  c.ar.norm_eps = 0.0  # 0: 1e-5 in a layernorm, 1e-6 in an rmsnorm
  c.ar.qk_norm = "rmsnorm"  # of queries and keys, per head: "rmsnorm", "layernorm" or "none"
  c.ar.qk_norm_eps = 0.0  # as norm_eps
  c.ar.ffn = "swiglu"  # "swiglu" or "mlp_gelu" (exact GELU)
  c.ar.mlp_ratio = 4.0  # hidden width / width; two thirds of it in a gated MLP
  c.ar.ffn_multiple_of = 64  # the hidden width of a gated MLP is rounded up to a multiple of this
  c.ar.bias = False  # of all linear layers
  c.ar.pos_embed = "absolute"  # learned positions, or a fixed "sincos1d" table
  c.ar.head_layernorm = False  # an additional LayerNorm before the readout
  c.ar.readout_multiplier = 1.0  # factor on the input of the readout (muP: base width / width)
  c.ar.drop_condition = 0.1  # fraction of samples trained without condition, for guidance [paper]
  c.ar.position_decay = 0.0  # the loss of position i (from 0) has weight (1 + i)^-position_decay, mean weight 1
  c.ar.loss_chunk = 16  # positions whose float32 logits are in memory at once
  c.ar.tokenizer = ""  # fingerprint of the tokenizer of these ids; "": that of the shards
  # Sampling, as of python -m flextok_jax.sample; guided logits are u + s (c - u).
  c.ar.guidance_scale = 1.5  # [paper: 1.5 of classes, 3.0 of text]
  c.ar.temperature = 1.0
  c.ar.top_k = 0  # 0: off
  c.ar.top_p = 0.0  # 0: off

  c.text = ConfigDict()  # of ar.condition "text"
  c.text.encoder = "t5"  # "t5": frozen [paper], or "bytes": a small encoder of UTF-8 bytes, trained jointly [ours]
  c.text.max_length = 120  # most tokens (or bytes) per caption, including the end token
  c.text.path = "google/flan-t5-xl"  # of "t5": folder with config.json, weights and tokenizer, or a hub repository
  c.text.features = 2048  # width of the encoder's output; of "t5", d_model [paper]
  c.text.mlp_hidden = 2048  # of the MLP from there to ar.width [code]
  c.text.depth = 4  # blocks of "bytes"
  c.text.head_dim = 64  # of "bytes"
  c.text.ngram_rows = 0  # of "bytes": rows of a hashed table of n-grams of bytes; 0: none [BLT, arXiv 2412.09871]

  c.vae_loss = ConfigDict()
  c.vae_loss.l1_weight = 1.0  # mean absolute error over pixels [ours: SDXL's trainer uses L1]
  c.vae_loss.l2_weight = 0.0  # mean squared error over pixels
  # Of the KL, summed over a latent, mean over the batch. [LDM] has 1e-6 with errors summed over the values of an image,
  # where ours are means: the equivalent at 256 px is 1e-6 / (3 * 256 * 256) = 5.1e-12 [ours: stronger].
  c.vae_loss.kl_weight = 1e-6
  c.vae_loss.detail_weight = 0.0  # of ops/distances.py:detail, without which a small autoencoder smoothes textures
  c.vae_loss.lpips_weight = 0.0  # of LPIPS by VGG16
  c.vae_loss.lpips = ""  # a folder with lpips_vgg, as docs/evaluation.md describes it
  c.vae_loss.train_encoder = True  # False: the decoder alone, so that latents stay, and tokenizers of them

  # Of stage "vae": a patch discriminator with hinge loss. Numbers without another source are [LDM]'s and [taming]'s.
  c.discriminator = ConfigDict()
  # Of the generator's loss, times the ratio of the reconstruction losses' gradient to its own at the decoder's last
  # layer; 0: no discriminator. [LDM: 0.5]
  c.discriminator.weight = 0.0
  c.discriminator.start_step = 50_000  # before it, the discriminator is neither trained nor used [LDM: 50001]
  c.discriminator.channels = 64  # of its first layer
  c.discriminator.num_layers = 3  # of stride 2

  c.data = ConfigDict()
  c.data.global_batch = 1024  # images per step, over all devices [ours]
  # "random": random resized crop; "center": resize the shorter side to image_size, centre crop. For folder, webdataset,
  # tfds and their files in arrayrecord; the other sources frame their images themselves.
  c.data.crop = "random"
  c.data.crop_min_area = 0.4  # smallest area of a random crop, as a fraction [ours: milder than a classifier's 0.08]
  c.data.flip = True  # horizontally, half of the images (never emoji: letters, arrows and flags are not symmetric)
  # Decode JPEG files of these four at 1/2, 1/4 or 1/8 of their size if the crop still has image_size pixels: less work;
  # pixels differ by about 1 of 255 levels, by 5 in the finest texture [ours].
  c.data.reduce_jpeg = True
  # (height, width) of the images of a batch, pixels; (): image_size twice. Several shapes, such as ((256, 256),
  # (192, 320)): each batch has one of them, and the update is compiled once for each.
  c.data.shapes = ()
  # Share of each shape among the batches. (): that of the pictures; each is read in the shape whose aspect ratio is
  # nearest to its own. For that the headers of all pictures are read at the start; drawn pictures need shares.
  c.data.shape_weights = ()
  c.data.num_threads = 8  # reading threads per process
  c.data.num_workers = 0  # worker processes per process; 0: threads only
  c.data.prefetch = 4  # batches prefetched on the host, besides two on the device
  c.data.tokens = ""  # of stage "ar": a folder that python -m flextok_jax.tokenize --config wrote
  # Of stages "tokenizer" and "distill": a folder that python -m flextok_jax.tokenize --what=latents wrote, in place of
  # data.sources and the VAE's encoder. Crops and flips are those made when the folder was written.
  c.data.latents = ""
  # Of stage "distill": a folder that python -m flextok_jax.tokenize --what=trajectories wrote, in place of
  # data.sources, the encoder and the teacher.
  c.data.trajectories = ""
  # With repa and data.latents: a folder that python -m flextok_jax.tokenize --what=dino wrote of the same images.
  c.data.teacher = ""
  # Share of unreadable images above which a command stops (training: of those since the last log line). A single one
  # stops nothing, unless the share is 0.
  c.data.max_unreadable = 0.01
  # weight: fraction of the images from a source. Its validation split never overlaps its training split.
  c.data.sources = ConfigDict()
  # Procedural scenes: pixels per side when drawn; "scenes", or "plain" for flat shapes on plain backgrounds.
  c.data.sources.synthetic = ConfigDict(dict(weight=0.0, render_size=64, style="scenes"))
  # A font, or a folder of glyphs in several styles; "" finds the system's NotoColorEmoji.ttf. centered: share of one
  # size on white, in place of random places, sizes and backgrounds. light: on plain light colours.
  c.data.sources.emoji = ConfigDict(dict(weight=0.0, path="", centered=0.0, light=False))
  # Photographs of scikit-image and scikit-learn, and of a folder's subfolders train and validation; "": no folder.
  c.data.sources.photos = ConfigDict(dict(weight=0.0, min_crop=64, path=""))
  # A folder of pictures; class = subfolder. caption_key, label_key: fields of metadata.jsonl or metadata.csv; "": those
  # named caption or text, and label.
  c.data.sources.folder = ConfigDict(dict(weight=0.0, path="", val_path="", caption_key="", label_key=""))
  # Tar files, as DIR/{00000..00099}.tar or a folder; caption_key, label_key: fields of the .json files.
  c.data.sources.webdataset = ConfigDict(dict(weight=0.0, path="", val_path="", caption_key="", label_key=""))
  # A folder that python -m flextok_jax.tokenize --what=images wrote: image files in ArrayRecord files.
  c.data.sources.arrayrecord = ConfigDict(dict(weight=0.0, path=""))
  c.data.sources.tfds = ConfigDict(
    dict(
      weight=1.0,
      name="imagenet2012",
      data_dir="",
      train_split="train",
      val_split="validation",
      image_key="image",
      label_key="label",
      caption_key="",
    )
  )  # "" or a text feature: "captions/text" of coco_captions

  c.optim = ConfigDict()
  c.optim.name = "adamw"  # or "muon": the blocks' matrices by Muon, the rest by Adam, at the same learning rate [ours]
  c.optim.learning_rate = 5.62e-4  # peak. [video] reports 1.124e-3 under muP; halved as there is no muP here [ours]
  # muP (Yang et al. 2022): the learning rate is that of a model of this width and transfers to other widths; 0: off.
  # Requires readout_multiplier = mup_base_width / width, in encoder and decoder or in ar.
  c.optim.mup_base_width = 0
  c.optim.end_learning_rate = 1e-6  # after the cosine
  c.optim.warmup_steps = 10_000
  c.optim.b1 = 0.9
  c.optim.b2 = 0.99  # [ours: large-batch transformers]
  c.optim.eps = 1e-8
  c.optim.weight_decay = 0.02  # matrices only: no biases, tables, registers or mask tokens [ours]
  c.optim.clip_norm = 1.0  # global L2 norm of the gradient
  c.optim.accumulate_steps = 1  # split the global batch into this many equal parts and average their gradients
  c.optim.ema_decay = 0.9999  # per step; evaluation and release use the average
  # Factors on the learning rate of these parts, weight decay included.
  c.optim.rates = ConfigDict(dict(encoder=1.0, decoder=1.0))
  # Adam of the discriminator; warm-up and end of its schedule are those above, in proportion.
  c.optim.discriminator = ConfigDict()
  c.optim.discriminator.learning_rate = 1e-4  # peak [ours: that of configs/vae.py; LDM has one for both networks]
  c.optim.discriminator.b1 = 0.5  # [LDM]
  c.optim.discriminator.b2 = 0.9  # [LDM]
  c.optim.discriminator.eps = 1e-8
  c.optim.discriminator.clip_norm = 1.0  # [ours: LDM does not clip]

  # LoRA (Hu et al. 2021): trains low-rank additions to the matrices of attention and MLP in place of a part.
  c.lora = ConfigDict()
  c.lora.rank = 0  # 0: off
  c.lora.alpha = 16.0  # the additions are multiplied by alpha / rank
  # Parts that have them, of those in train.parts, whose others are trained in full; (): all that have attention.
  c.lora.parts = ()

  c.train = ConfigDict()
  c.train.num_steps = 400_000
  # Top-level parts of the model to train: of stage "tokenizer" ("encoder", "decoder"); (): all that the stage trains.
  # The others stay as in init_from, without gradients and optimizer state.
  c.train.parts = ()
  c.train.log_every = 100  # steps
  c.train.checkpoint_every = 5_000  # steps
  c.train.keep_checkpoints = 3  # newest checkpoints to keep, and of the older ones that of the lowest loss
  c.train.keep_period = 100_000  # also keep checkpoints at multiples of this step; 0: none
  c.train.eval_every = 10_000  # steps
  c.train.tensorboard = True  # if the extra tensorboard is installed
  c.train.wandb = ""  # project of Weights & Biases that the run is logged to; "": none
  c.train.export_dtype = "bfloat16"  # of weights.safetensors, the averaged weights written at the end

  c.eval = ConfigDict()
  c.eval.sources = ("tfds",)  # validation splits, reported separately
  c.eval.num_images = 256  # per source
  c.eval.batch_size = 32
  c.eval.num_tokens = ()  # (): the powers of two up to num_registers
  c.eval.grid_images = 4  # per source, rows of the picture

  # Axes of the device mesh; a run may resume with others. One may be -1: all remaining devices.
  c.mesh = ConfigDict()
  c.mesh.data = -1  # data parallelism: each part of the batch has its own copy of parameters and optimizer state
  # Data parallelism with parameters and optimizer state sharded over the parts. 0: at each start, as small as fits the
  # devices (training/plan.py); with a given data, the remaining devices.
  c.mesh.fsdp = 0
  # Shards optimizer state and average over "data" too (ZeRO-1): "on", "off", or "auto": where a step needs it to fit.
  c.mesh.shard_update = "auto"
  c.mesh.tensor = 1  # tensor parallelism: parts of every block's heads and hidden units
  # Slices of a TPU pod (or groups of GPUs that jax calls slices; on CPUs, processes) that "data" spans: only gradients
  # cross the slower connections between them.
  c.mesh.slices = 1
  c.mesh.chosen = ""  # set by training: the mesh of its last start, with what it was estimated to need
  return c.lock()
