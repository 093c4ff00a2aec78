"""One small network of each family of dynamic networks, trained on real digits in under a minute and measured.

    python -m examples.skipnet                train, measure, print a row
    python -m examples.skipnet --seconds 5    train for 5 seconds instead of a fixed number of steps
    python -m examples.skipnet --seed 1 --json row.json
    python -m examples.all --out rows.csv     all of them; .csv, .json or .md by the name's end

They need scikit-learn, which holds the digits.
"""
