"""What can be taken out of a block, by name. No torch here: `rc-probe --help` reads it."""

COMPONENTS = {
    "attention": "the attention branch; its skip goes on alone",
    "attention.skip": "the skip around the attention branch; the branch goes on alone",
    "mlp": "the MLP branch; its skip (and, post-LN, its norm) goes on alone",
    "mlp.skip": "the skip around the MLP branch; the branch goes on alone",
    "mlp.sublayer": "the MLP sublayer as a whole: branch, its own skip and, post-LN, its norm",
    "cross": "the cross-attention branch",
    "cross.skip": "the skip around the cross-attention branch",
    "mixer": "the branch that mixes tokens without attention (state space, convolution …)",
    "mixer.skip": "the skip around that branch",
    "skip": "every skip of the block: its branches go on alone, or with a skip of another strength",
    "head": "one attention head",
    "block": "the whole block: the stream leaves it as it entered",
}
ONLY_REMOVED = {"mlp.sublayer", "block"}  # have no gate between 0 and 1
