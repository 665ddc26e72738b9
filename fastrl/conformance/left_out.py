"""Cases of T1 to T38 and of the pitfalls that no neutral check can ask, and why."""

LEFT_OUT = {
    "T11": "more than 2^31 logits need 8 GiB and more",
    "T14": "whether a kernel is tuned at run time is seen in its source",
    "T26": "whitening over ranks: needs several processes and each project's own way to start them",
    "T29": "devices and streams: needs two GPUs",
    "T31": "memory of a call: `fastrl bench` measures it",
    "pitfall 4": "a penalty for a missing stop token is an option of a loop",
    "pitfall 14": "whitening over ranks, as T26",
    "pitfall 20": "settings of generation belong to the loop that samples",
    "pitfall 27": "labels of sequence-parallel shards: needs several processes",
    "pitfall 33": "which model is the reference is decided in a loop",
    "pitfall 34": "wrappers around an adapter: needs several processes",
    "pitfall 36": "dropout between two passes of a loop",
    "pitfall 40": "the place of Adam's epsilon is torch's",
    "pitfall 42": "memory of a call, as T31",
    "pitfall 46": "the order of seed and adapter is decided in a loop",
    "pitfall 47": "stability of a whole run",
}
