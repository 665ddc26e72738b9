"""Types of the native module; a test compares this file with the module. Addresses and streams are integers."""

Rows = tuple[int, int, int, int, int]  # address, dtype code, inner, outer stride, inner stride

has_cuda: bool

def cpu_isa() -> str: ...
def advise_huge_pages(data: int, bytes: int) -> None: ...
def cuda_runtime_version() -> int: ...
def cuda_driver_version() -> int: ...
def cuda_device_count() -> int: ...
def lora_dropout(matrix: int, dtype: int, rows: int, cols: int, seed: int, threshold: int, threads: int) -> None: ...
def token_logprobs_fwd(
    logits: Rows,
    token_ids: int,
    mask: int,
    rows: int,
    vocab: int,
    inv_temperature: float,
    softcap: float,
    logprobs: int,
    row_stats: int,
    entropy: int,
    threads: int,
) -> None: ...
def token_logprobs_bwd(
    logits: Rows,
    token_ids: int,
    mask: int,
    row_stats: int,
    logprobs: int,
    entropy: int,
    dlogprobs: int,
    dentropy: int,
    rows: int,
    vocab: int,
    inv_temperature: float,
    softcap: float,
    dlogits: Rows,
    threads: int,
) -> None: ...
