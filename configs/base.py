"""Every key that an experiment can set, with its default; not an experiment itself."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the defaults that the other files in this folder start from."""
    config = ConfigDict()

    config.task = "classification"
    # Modules with NORMALIZERS or TASKS of their own, for keys to name
    config.plugins = ()

    # Data
    # digits, digits32, cifar10, cifar100, svhn_cropped (with extra), in memory; or
    # imagenet2012, folder (data_dir/train/CLASS/, data_dir/val/CLASS/), read from disk
    config.dataset = "digits"
    config.train_examples = 0  # use the first so many training images; 0: all
    config.test_examples = 0  # and of the test images
    config.standardize = "channel"  # channel: mean 0, std 1; pixel: (x - mean) / 128
    # Images on disk: random crops of 8 to 100 % of the area, resized, to train; of the
    # shorter side resized to 256/224 of this the centre, to test.
    config.image_size = 224
    config.max_pixels = 89_478_485  # larger images are refused; Pillow's own limit
    config.data_workers = 0  # processes that decode them; 0: threads, one a core
    # Images in memory:
    config.crop_padding = 0  # random crops after padding by so many pixels
    # All images:
    config.flip = False  # random horizontal flips

    # Network
    config.network = "cifar_resnet"  # a name in kalman_flax.NETWORKS
    # of cifar_resnet, cifar_resnet_v1 and nf_resnet, of 6n + 2 layers:
    config.blocks_per_stage = 1  # n
    # of the first two alone:
    config.scan_blocks = False  # nn.scan over equal blocks; slow on CPU
    # of every network but small_inception: channels of its first stage; 0: its own
    config.width = 0
    # of every network:
    config.dtype = "float32"  # of the computation: float32 or bfloat16
    # Holds less: norms and activations are computed again in the backward pass.
    config.remat = False

    # Normaliser
    config.norm = "kalman"  # a name in kalman_flax.NORMALIZERS, or of a plugin
    config.norm_options = ConfigDict()  # its attributes: --config.norm_options.gain=0.5
    config.stats_momentum = 0.9  # of the running statistics

    # Batches
    config.batch_size = 32  # examples per parameter update, over all devices
    config.micro_batch_size = 2  # examples that share statistics
    config.accumulate = (
        1  # parts that a device runs one after the other, to save memory
    )
    config.sync_statistics = False  # share statistics over all micro-batches of a part
    config.sort_batches = False  # by class, so that a micro-batch is of one class

    # Optimisation; weight decay is on kernels only
    config.optimizer = "sgd"  # sgd, adamw or lars
    # Its options as of optax: --config.optimizer_options.nesterov=True
    config.optimizer_options = ConfigDict()
    config.sgd_momentum = 0.9  # of sgd and lars
    config.weight_decay = 2e-4
    config.clip_norm = 0.0  # the gradient is made no longer than this; 0: left as it is
    # Parameters that stay as they are, by patterns of their paths: ("stem*",)
    config.freeze = ()

    # Schedule: each in epochs or in steps, and the other one 0 or ()
    config.epochs = 10
    config.total_steps = 0
    config.learning_rate = 0.1
    config.warmup_epochs = 0
    config.warmup_steps = 0
    config.warmup_from = 0.0  # the share of the rate that the warm-up starts from
    config.schedule = "cosine"  # cosine or step
    config.step_epochs = ()  # step: at these epochs the rate is multiplied
    config.step_drops = ()  # step: after so many updates
    config.step_factors = ()  # step: by these factors
    config.seed = 0

    # Reporting
    config.log_steps = 20
    config.eval_epochs = 1  # test accuracy every so many epochs, and at the end
    config.checkpoint_epochs = 1
    config.eval_batch_size = 500
    config.profile_steps = ()  # (first, last) updates of a profiler's trace
    config.debug_nans = False  # name the first layer that gives a NaN; slow

    # Study: (name, keys to change) of the runs that train.compare puts side by side
    config.variants = ()
    return config
