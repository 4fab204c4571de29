"""The one table of tolerances. Each says why it is what it is."""

# Sums of float32 products over a few hundred terms against the same sums in float64: relative 1e-6 an operation,
# a few layers deep, on logits of size up to ten.
LOGITS_FLOAT32 = 1e-4

# The same for one pass of the three-layer tiny model, whose logits are of size one: what is promised of adapters.
ADAPTER_FLOAT32 = 1e-5

# KL(rule || F32 file) on the tiny random model, whose gates the clamp basis (rms error 0.003) meets unprepared.
KL_TINY_FLOAT = 1e-4

# The same where weights and biases are rounded to bfloat16 (8 bits), biases of a clamp basis up to 45 included.
KL_TINY_BFLOAT16 = 1e-3

# A quantised tiny model against its own dequantised weights: new down columns are quantised again, and llama.cpp
# quantises activations to 8 bits. Measured 0.001 to 0.010 (floor 0.001 to 0.005). NVFP4 0.021: its scales of three
# bits end at 2^-9, which a clamp's up rows (alpha 0.02 to 0.07) reach.
KL_TINY_QUANTISED = {"NVFP4": 5e-2}
KL_TINY_QUANTISED_OTHERS = 2e-2

# The same with rows of their own in the up projection (dense units), which nothing corrects: two bits and less leave
# them 20 to 45% wrong. Measured Q2_K 0.027, IQ2_XXS 0.045, IQ1_M 0.097, NVFP4 0.011; BF16, which keeps 8 bits, 0.00011.
KL_TINY_PROGRAM = {"F32": 1e-4, "F16": 1e-4, "BF16": 1e-3, "Q2_K": 5e-2, "IQ2_XXS": 1e-1, "IQ1_M": 2e-1, "NVFP4": 5e-2}

# The same where there is no room for corrections, in the coarsest codebook: measured 0.023, in plain order 0.31.
KL_TINY_LAYOUT_ALONE = 5e-2

# New columns of random weights against what they should be, relative: without corrections, with them. A quarter above
# what was measured, for other processors: without, a type's own error of values that were in it before; with, its
# square, and more where corrections share a superblock with what they correct.
COLUMNS = {
    "Q4_0": (0.07, 0.0041),
    "Q4_1": (0.062, 0.0031),
    "Q5_0": (0.037, 0.0011),
    "Q5_1": (0.03, 0.00075),
    "Q8_0": (0.0047, 3.8e-05),
    "Q2_K": (0.17, 0.083),
    "Q3_K": (0.087, 0.017),
    "Q4_K": (0.053, 0.01),
    "Q5_K": (0.027, 0.01),
    "Q6_K": (0.013, 0.0035),
    "IQ4_NL": (0.067, 0.0039),
    "IQ4_XS": (0.068, 0.01),
    "IQ3_S": (0.14, 0.042),
    "IQ3_XXS": (0.23, 0.05),
    "IQ2_S": (0.24, 0.083),
    "IQ2_XS": (0.35, 0.11),
    "IQ2_XXS": (0.4, 0.14),
    "IQ1_S": (0.46, 0.19),
    "IQ1_M": (0.5, 0.32),
    "TQ1_0": (0.087, 0.029),
    "TQ2_0": (0.087, 0.029),
    "Q2_0": (0.14, 0.049),
    "Q1_0": (0.071, 0.038),
    "MXFP4": (0.021, 3.8e-05),
    "NVFP4": (0.084, 0.0041),
}

# Width of a histogram bin, 2^(1/10): a quantile inside one cannot be off by more; 1% is promised where bins are full.
QUANTILE_BIN = 0.075
QUANTILE_FULL_BINS = 0.01

# Of a bin above 32, 2^(1/2).
QUANTILE_WIDE_BIN = 0.42

# One rounding of an f16 block scale.
F16_SCALE = 2.0**-10

# A row of MXFP4 or NVFP4 times a factor, quantised again: measured 0.12 and 0.10 (a new row: 0.12 and 0.09).
MXFP4_AGAIN = 0.15
NVFP4_AGAIN = 0.15

# Worst error and normal-weighted rms of the clamp bases, as stated beside them, rounded up in the fourth digit.
CLAMP_STATED = 1.005

# Float32 rounding of a probability or shift of size one.
FLOAT32 = 1e-6

# bfloat16 keeps 8 bits: a sign of an activation near zero may differ between one pass and step-by-step decoding.
SIGNS_BFLOAT16 = 0.01

# Nodes of llama.cpp's graph against float64: sums of at most 96 float32 products; its SiLU and GELU go through
# tables of float16 where the build has them, relative 5e-4 of values of size one.
GRAPH_NODES = 5e-3

# A qwen2 file and the same written as llama, both float32 in llama.cpp: the same sums in another order. Measured 2e-12.
KL_SAME_MODEL = 1e-10

# llama.cpp keeps keys and values in F16 (11 bits): activations of size one differ by a few of their last bits.
KV_FLOAT16 = 1e-3
# llama.cpp's attention in two partitions of a sequence: keys, values and its sums of them are float16 (11 bits), three
# layers deep, on logits of size four. Measured 0.03.
LOGITS_LLAMACPP = 6e-2

# Gates of a tiny model in llama.cpp against float64: float16 keys and values, as above, on gates of size one.
GATE_LLAMACPP = 2e-2

# A value is looked up by the upper 12 bits of its mantissa: at most half of the last one off, twice that of SiLU's
# steepest relative slope, and float32 rounding beside it.
LOG_BIN = 2.5e-4

# Signs and rates of gates in llama.cpp's arithmetic with Q4_1 weights against float32: measured 99.3% and 0.9993.
SIGNS_QUANTISED = 0.99
RATES_CORRELATION = 0.999

# One MLP in float32 against float64, relative to its largest output: sums of a few hundred products.
MLP_FLOAT32 = 5e-6

# The same distance measured in llama.cpp (its own attention) and in torch, on answers that differ a little.
KL_TWO_MEASURES = 2.0

# Overlap of selections that is forecast against the one that happens, means of four random worlds: measured at most
# 0.07. Where nearly all deltas have one sign, the few of the other are too few for a fixed prior: measured 0.06.
OVERLAP_FORECAST = 0.1
OVERLAP_FORECAST_SKEWED = 0.12

# A rule in columns of few bits, on one layer of random weights, which have no structure that rounding could keep: nats
# between rule and file. At gamma 0.5 measured 0.0021 to 0.0026 for IQ2_XS and 0.0032 to 0.0056 for IQ1_S (three seeds,
# with and without a bfloat16 copy), where rule and base are 0.13 to 0.24 apart; at gamma 1.4 up to 0.011 and 0.016.
KL_FEW_BITS = {"IQ2_XS": 0.02, "IQ1_S": 0.02}

# KL(rule || dial) on the tiny model with five units a clamp, at every strength and mix: what is promised of dials in
# float32. Measured 4.8e-6 to 7.6e-6, nearly all of it the clamp basis.
KL_DIAL = 1e-5

# A dial's shifts in float32 files, against float64: no clamp basis is involved, only float32 sums and float16 keys and
# values. Measured 8.5e-7, of the unsteered model 7.4e-7.
KL_DIAL_SHIFTS = 2e-6

# Units fitted to the gates that a neuron has against units for a standard normal gate, errors. Measured 0.2 to 0.75.
CLAMP_FITTED = 0.9

# KL(rule || F32 file) with three units a clamp, fitted to their gates, on the tiny model. Measured 4e-6 to 1.2e-5.
KL_EXACT_FITTED = 3e-5

# Size of the residual stream in llama.cpp against float64, relative: float16 keys and values, see KV_FLOAT16.
STREAM_LLAMACPP = 1e-2

# A KL of about 0.1 nats measured by a runtime against float64: the same noise on both sides of a difference.
KL_TWO_ENGINES = 0.03

# Sums of float64 numbers in another order, relative to the sum of their sizes: 2^-53 for each of a few dozen additions.
SUMS_FLOAT64 = 1e-14

# KL of two rows of float32 logits, absolute: powers of float32 are off by 6e-8 of themselves, which is weighed by a
# change of about one; over 49,152 tokens measured 3e-8.
KL_OF_FLOAT32_ROWS = 1e-7
