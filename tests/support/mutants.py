"""For each conformance case an implementation that is broken in the way the case is about."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from broken_parts import (
    Accumulates,
    Changed,
    RoundedProbabilities,
    after,
    as_if_contiguous,
    block_by_block,
    branching,
    clamped_ids,
    divides_in_place,
    filtered,
    first_upstream,
    flat,
    frozen_with_its_input,
    gae,
    gae_of_blocks,
    gae_of_products,
    gae_with_drift,
    in_the_logits_dtype,
    k3_of_exp,
    keeping,
    labels_of_everything,
    labels_without_padding,
    later_policy,
    log_of_sigmoid,
    maximum_from_zero,
    minus_logsumexp,
    more_for_many_rows,
    naive_ppo,
    noisy,
    on_first,
    padded_with_zeros,
    resumed_with_another_generator,
    reward_of_products,
    row_chunks,
    rows_of_one_grid,
    score_before_the_first_pad,
    score_by_count,
    score_of_the_last_column,
    shared_buffer,
    softcap_over_all,
    swapped_k3,
    swapped_positions,
    through,
    unclipped_controller,
    unmasked_gradient,
    unscaled_dropout,
    whitened_by_bessel,
    whitened_by_products,
    whitened_by_row,
    whitened_by_squares,
    without,
    without_attention_mask,
    without_autocast,
    without_positions,
    zero_for_an_empty_head,
    zero_is_missing,
)

from fastrl.conformance.adapters import torch as good

TOKEN = {
    "per_token_gradients": after(good.token_logprobs, first_upstream),
    "odd_vocabularies": padded_with_zeros,
    "gradient_near_probability_one": RoundedProbabilities.apply,
    "very_negative_rows": maximum_from_zero,
    "banned_tokens": block_by_block,
    "common_offset": minus_logsumexp,
    "token_out_of_range": clamped_ids(good.token_logprobs),
    "any_layout": on_first(good.token_logprobs, as_if_contiguous),
    "many_rows": rows_of_one_grid,
    "second_backward": on_first(good.token_logprobs, Accumulates.apply),
    "temperature_leaves_the_logits_alone": divides_in_place,
    "a_row_does_not_depend_on_its_batch": more_for_many_rows,
    "two_runs_are_equal": after(good.token_logprobs, noisy),
    "half_precision_logits": in_the_logits_dtype,
    "gradients_have_their_inputs_dtype": in_the_logits_dtype,
    "compiles": after(good.token_logprobs, branching),
    "softcap_after_banning": softcap_over_all,
    "nothing_is_kept_alive": on_first(good.token_logprobs, keeping),
    "improbable_tokens_keep_their_gradient": on_first(good.token_logprobs, filtered),
    "gradient_through_a_view": on_first(good.token_logprobs, torch.Tensor.detach),
}
ENTROPY = {
    "entropy_of_banned_tokens": lambda logits: -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1),
    "entropy_of_logits": lambda logits: -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1),
}
HEAD = {
    "per_token_gradients": after(good.linear_logprobs, first_upstream),
    "weight_gradient_over_many_rows": row_chunks,
    "odd_vocabularies": through(padded_with_zeros),
    "gradient_near_probability_one": through(RoundedProbabilities.apply),
    "very_negative_rows": through(maximum_from_zero),
    "common_offset": through(minus_logsumexp),
    "banned_tokens": through(block_by_block),
    "token_out_of_range": clamped_ids(good.linear_logprobs),
    "any_layout": on_first(good.linear_logprobs, as_if_contiguous),
    "second_backward": on_first(good.linear_logprobs, Accumulates.apply),
    "two_runs_are_equal": after(good.linear_logprobs, noisy),
    "half_precision_head": through(in_the_logits_dtype),
    "gradients_have_their_inputs_dtype": on_first(good.linear_logprobs, lambda x: Changed.apply(x, lambda g: g * 1.05)),
    "nothing_is_kept_alive": on_first(good.linear_logprobs, keeping),
    "improbable_tokens_keep_their_gradient": lambda h, weight, ids: good.linear_logprobs(h, filtered(weight), ids),
    "only_what_is_trained_gets_a_gradient": lambda h, weight, ids: good.linear_logprobs(h, weight.detach(), ids),
}
HEAD_OPTIONS = {
    "compiles": after(good.linear_logprobs, branching),
    "sharded_head": zero_for_an_empty_head,
    "bias_of_the_head": without(good.linear_logprobs, "bias"),
    "softcap_of_the_head": without(good.linear_logprobs, "softcap"),
    "adapter_on_the_head": without(good.linear_logprobs, "lora"),
    "tied_weights": lambda hidden, weight, ids: good.linear_logprobs(hidden, weight.detach(), ids),
    "one_temperature_on_both_paths": without(good.linear_logprobs, "temperature"),
    "padded_and_packed_states": swapped_positions,
    "no_rows": lambda hidden, weight, ids: good.linear_logprobs(hidden, weight, ids).mean(),
}
LOSS = {
    "gradients_of_the_mean": after(good.linear_cross_entropy, lambda x: Changed.apply(x, torch.ones_like)),
    "weight_gradient_of_the_mean": lambda h, w, labels: -row_chunks(h, w, labels).mean(),
    "ignored_labels": lambda h, w, labels: good.linear_cross_entropy(h, w, labels.clamp(min=0)),
    "nothing_but_ignored_labels": lambda h, w, labels: F.cross_entropy(h @ w.T, labels),
    "second_backward_of_the_mean": on_first(good.linear_cross_entropy, Accumulates.apply),
    "one_definition_of_the_loss": lambda h, w, labels: good.linear_cross_entropy(h, w, labels, denominator=len(h) + 1),
    "micro_batches_add_up": without(good.linear_cross_entropy, "denominator"),
}
LORA = {
    "gradients_of_every_input": on_first(good.lora_linear, lambda x: Changed.apply(x, lambda g: g * 2)),
    "second_backward": on_first(good.lora_linear, Accumulates.apply),
    "any_layout": on_first(good.lora_linear, as_if_contiguous),
    "dtypes": after(good.lora_linear, torch.Tensor.float),
    "dtypes_under_autocast": without_autocast,
    "dropout_reaches_the_input_gradient": unmasked_gradient,
    "dropout_keeps_the_mean": unscaled_dropout,
    "any_number_of_rows": flat,
    "compiles": after(good.lora_linear, branching),
    "bias_of_the_base": without(good.lora_linear, "bias"),
    "nothing_is_kept_alive": on_first(good.lora_linear, keeping),
    "only_what_is_trained_gets_a_gradient": frozen_with_its_input,
    "two_runs_are_equal": after(good.lora_linear, noisy),
}
GAE = {
    "by_hand": gae(lambda rewards, values, mask: (rewards, values.roll(1, 1), mask)),
    "any_length": gae_of_blocks,
    "padding": gae_of_products,
    "holes": gae(lambda rewards, values, mask: (rewards * mask, values * mask, torch.ones_like(mask))),
    "nothing_kept": gae(lambda rewards, values, mask: (rewards, values, torch.ones_like(mask))),
    "reordering": gae_with_drift,
    "any_layout": gae(lambda rewards, values, mask: (as_if_contiguous(rewards), values, mask)),
}
REWARDS = {
    "kl_estimators": {"kl": swapped_k3},
    "extreme_log_ratios": {"kl": k3_of_exp},
    "score_on_the_last_token": {"kl_reward": score_by_count},
    "padding_has_no_reward": {"kl_reward": reward_of_products},
    "a_score_of_zero": {"kl_reward": zero_is_missing},
    "adaptive_coefficient": {"kl_controller": unclipped_controller},
    "whitening": {"whiten": whitened_by_row},
    "centring": {"whiten": lambda x, mask, center=True: good.whiten(x, mask, center=not center)},
    "whitening_beside_padding": {"whiten": whitened_by_products},
    "whitening_next_to_nothing": {"whiten": whitened_by_bessel},
    "whitening_a_common_offset": {"whiten": whitened_by_squares},
}
PPO = {
    "closed_form": naive_ppo(value_scale=1.0),
    "policy_loss_in_closed_form": naive_ppo(side=torch.minimum),
    "before_any_update": later_policy,
    "padding": naive_ppo(),
    "padding_of_values": naive_ppo(),
    "extra_padding": naive_ppo(over="all"),
    "nothing_kept": naive_ppo(),
    "banned_token": naive_ppo(masked_ratio=True),
    "extreme_log_ratios": naive_ppo(),
    "extreme_log_ratios_in_padding": naive_ppo(),
    "second_backward": shared_buffer,
    "micro_batches_add_up": without(good.ppo_loss, "denominator"),
}
RANKING = {
    "closed_form": without(good.ranking_loss, "margin"),
    "extreme_differences": log_of_sigmoid,
}
DATA = {
    "supervised_tokens": {"sft_labels": labels_of_everything},
    "end_token_is_the_pad_token": {"sft_labels": labels_without_padding},
    "score_of_the_last_token": {"pooled_scores": score_of_the_last_column},
    "score_where_pad_is_eos": {"pooled_scores": score_before_the_first_pad},
    "extra_padding_of_scores": {"pooled_scores": score_of_the_last_column},
    "a_run_that_is_gone_on_with": {"resume": resumed_with_another_generator},
}


MODELS = {
    "left_padding": without_attention_mask,
    "left_padding_of_absolute_positions": without_positions,
    "extra_padding": without_attention_mask,
}


def _named(module, part, broken):
    return {f"{module}.{name}": {part: function} for name, function in broken.items()}


# case: the broken parts
MUTANTS = {
    **_named("token_logprobs", "token_logprobs", TOKEN),
    **_named("token_logprobs", "entropy", ENTROPY),
    **_named("linear_logprobs", "linear_logprobs", HEAD),
    **_named("head_options", "linear_logprobs", HEAD_OPTIONS),
    **_named("linear_cross_entropy", "linear_cross_entropy", LOSS),
    **_named("lora_linear", "lora_linear", LORA),
    **_named("gae", "gae", GAE),
    **_named("models", "sequence_logprobs", MODELS),
    **{f"data.{name}": broken for name, broken in DATA.items()},
    **{f"rewards.{name}": broken for name, broken in REWARDS.items()},
    **_named("ppo_loss", "ppo_loss", PPO),
    **_named("ranking_loss", "ranking_loss", RANKING),
}
