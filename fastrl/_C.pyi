"""Types of the native module; a test compares this file with the module. Addresses and streams are integers."""

Rows = tuple[int, int, int, int, int]  # address, dtype code, inner, outer stride, inner stride

has_cuda: bool
cuda_architectures: str

class cuda:
    """The submodule of the CUDA kernels; absent from a module that was built without CUDA."""

    @staticmethod
    def gae(
        rewards: int,
        values: int,
        mask: int,
        dones: int,
        lambdas: int,
        bootstrap_value: int,
        rows: int,
        steps: int,
        gamma: float,
        gae_lambda: float,
        advantages: int,
        returns: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def linear_head_rows(
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
        out: Rows,
        entropy_out: Rows,
        stream: int,
    ) -> None: ...
    @staticmethod
    def linear_head_gradient(
        logits: Rows,
        token_ids: int,
        mask: int,
        begin: int,
        rows: int,
        columns: int,
        row_stats: int,
        logprobs: int,
        entropy: int,
        dlogprobs: int,
        dentropy: int,
        inv_temperature: float,
        softcap: float,
        out: Rows,
        stream: int,
    ) -> None: ...
    @staticmethod
    def lora_da(
        x: int,
        x_stride: int,
        ddown: int,
        dtype: int,
        rows: int,
        cols: int,
        rank: int,
        seed: int,
        threshold: int,
        workspace: int,
        da: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def lora_da_workspace(rows: int, cols: int, rank: int) -> int: ...
    @staticmethod
    def lora_down(
        x: int,
        x_stride: int,
        lora_a: int,
        dtype: int,
        rows: int,
        cols: int,
        rank: int,
        seed: int,
        threshold: int,
        down: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def lora_dx(
        ddown: int,
        lora_a: int,
        dtype: int,
        rows: int,
        cols: int,
        rank: int,
        seed: int,
        threshold: int,
        dx: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def lora_dropout(matrix: int, dtype: int, rows: int, cols: int, seed: int, threshold: int, stream: int) -> None: ...
    @staticmethod
    def lora_up_backward(
        dy: int,
        down: int,
        down_stride: int,
        lora_b: int,
        dtype: int,
        rows: int,
        cols: int,
        rank: int,
        scaling: float,
        workspace: int,
        ddown: int,
        ddown_stride: int,
        db: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def lora_up_backward_workspace(rows: int, cols: int, rank: int) -> int: ...
    @staticmethod
    def ppo_advantages(
        logprobs: int,
        ref_logprobs: int,
        values: int,
        scores: int,
        mask: int,
        rows: int,
        steps: int,
        kl_coef: float,
        kl_estimator: int,
        kl_clip: float,
        score_clip: float,
        gamma: float,
        gae_lambda: float,
        center: bool,
        scale: bool,
        advantages: int,
        returns: int,
        rewards: int,
        kl: int,
        moments: int,
        stats: int,
        workspace: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def ppo_advantages_workspace(rows: int) -> int: ...
    @staticmethod
    def ppo_loss(
        logprobs: int,
        values: int,
        entropy: int,
        old_logprobs: int,
        old_values: int,
        advantages: int,
        returns: int,
        mask: int,
        denominator: int,
        size: int,
        clip_coef: float,
        vf_clip_coef: float,
        vf_coef: float,
        ent_coef: float,
        dual_clip: float,
        loss: int,
        stats: int,
        dlogprobs: int,
        dvalues: int,
        dentropy: int,
        workspace: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def ppo_loss_workspace(size: int) -> int: ...
    @staticmethod
    def ranking_loss(
        scores: int,
        group_ids: int,
        ranks: int,
        margins: int,
        size: int,
        center_coef: float,
        loss: int,
        stats: int,
        dscores: int,
        workspace: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def ranking_loss_workspace(size: int) -> int: ...
    @staticmethod
    def token_logprobs_workspace(rows: int, vocab: int, dtype: int) -> int: ...
    @staticmethod
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
        workspace: int,
        stream: int,
    ) -> None: ...
    @staticmethod
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
        stream: int,
    ) -> None: ...

def cpu_isa() -> str: ...
def advise_huge_pages(data: int, bytes: int) -> None: ...
def cuda_runtime_version() -> int: ...
def cuda_driver_version() -> int: ...
def cuda_device_count() -> int: ...
def cuda_probe() -> str: ...
def linear_head_begin(
    x: Rows, targets: Rows, rows: int, width: int, softcap: float, sweeps: int, threads: int
) -> None: ...
def linear_head_sweep(
    logits: Rows,
    token_ids: int,
    begin: int,
    rows: int,
    columns: int,
    inv_temperature: float,
    softcap: float,
    with_entropy: bool,
    write: bool,
    products: Rows,
    sweeps: int,
    threads: int,
) -> None: ...
def linear_head_fold(
    block: Rows,
    product_block: Rows,
    sweeps: int,
    rows: int,
    width: int,
    sums: int,
    weighted: int,
    threads: int,
) -> None: ...
def linear_head_finish(
    sweeps: int,
    rows: int,
    inv_temperature: float,
    softcap: float,
    logprobs: int,
    row_stats: int,
    entropy: int,
    coefficients: int,
    entropy_coefficients: int,
) -> None: ...
def linear_head_direction(
    targets: Rows,
    sums: int,
    weighted: int,
    coefficients: int,
    rows: int,
    width: int,
    out: int,
    threads: int,
) -> None: ...
def linear_head_gradient(
    logits: Rows,
    token_ids: int,
    begin: int,
    rows: int,
    columns: int,
    row_stats: int,
    logprobs: int,
    entropy: int,
    dlogprobs: int,
    dentropy: int,
    inv_temperature: float,
    softcap: float,
    threads: int,
) -> None: ...
def linear_head_scale(
    direction: Rows,
    entropy_direction: Rows,
    mask: int,
    dlogprobs: int,
    dentropy: int,
    rows: int,
    width: int,
    dhidden: Rows,
    threads: int,
) -> None: ...
def lora_dropout(matrix: int, dtype: int, rows: int, cols: int, seed: int, threshold: int, threads: int) -> None: ...
def gae(
    rewards: int,
    values: int,
    mask: int,
    dones: int,
    lambdas: int,
    bootstrap_value: int,
    rows: int,
    steps: int,
    gamma: float,
    gae_lambda: float,
    advantages: int,
    returns: int,
    threads: int,
) -> None: ...
def ppo_advantages(
    logprobs: int,
    ref_logprobs: int,
    values: int,
    scores: int,
    mask: int,
    rows: int,
    steps: int,
    kl_coef: float,
    kl_estimator: int,
    kl_clip: float,
    score_clip: float,
    gamma: float,
    gae_lambda: float,
    center: bool,
    scale: bool,
    advantages: int,
    returns: int,
    rewards: int,
    kl: int,
    moments: int,
    stats: int,
    threads: int,
) -> None: ...
def ppo_loss(
    logprobs: int,
    values: int,
    entropy: int,
    old_logprobs: int,
    old_values: int,
    advantages: int,
    returns: int,
    mask: int,
    denominator: int,
    size: int,
    clip_coef: float,
    vf_clip_coef: float,
    vf_coef: float,
    ent_coef: float,
    dual_clip: float,
    loss: int,
    stats: int,
    dlogprobs: int,
    dvalues: int,
    dentropy: int,
    threads: int,
) -> None: ...
def ranking_loss(
    scores: int,
    group_ids: int,
    ranks: int,
    margins: int,
    size: int,
    center_coef: float,
    loss: int,
    stats: int,
    dscores: int,
    threads: int,
) -> None: ...
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
