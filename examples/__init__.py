"""One small network of each family of dynamic networks, trained on real digits in under a minute and measured.

    python -m examples.samples.skipnet                train, measure, print a row
    python -m examples.samples.skipnet --seconds 5    train for 5 seconds instead of a fixed number of steps
    python -m examples.samples.skipnet --seed 1 --out row.json
    python -m examples.all --out rows.csv             all of them; .csv, .json or .md by the name's end
    python -m examples.all fbs moe                    two of them
    python -m examples.pixels.fcmae                   masked pretraining: it trains, and has no row

The digits are scikit-learn's (``pip install scikit-learn``), 8x8 pixels enlarged to 12 to 32. Measured is one batch of the 360
test images. A row has the accuracy of the dynamic network; the MACs of a sample in the static network, with
every gate open and no gate computed, and in the dynamic one, with its gates; theory, the ratio of the two; the time of both,
interleaved; the speed-up, and the share of theory that it is (realised).

Time is that of eager PyTorch, the static network in the faster of NCHW and channels_last; ``torch.compile``, which the
benchmarks try too, would take longer than the training. MACs leave out norms, activations, sums and every move of memory,
which skipped layers save as well, and the gathers, the gates' small operators and the fixed cost of a call, which the
dynamic network pays. The networks are small: a layer takes fractions of a millisecond, so that what MACs leave out
weighs more than in networks of a useful size. ``python -m benchmarks`` measures those.
"""
