// Every function of fastrl._C.cuda. As in ../bindings.cpp, with the stream in place of the thread
// count; the GIL is released because a launch waits where the GPU's queue is full.

#include "bindings.h"

#include "../pointers.h"
#include "ops.h"

namespace py = pybind11;

namespace fastrl::cuda {
namespace {

void bind_gae(py::module_& m) {
  m.def(
      "gae",
      [](uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t dones, uintptr_t lambdas,
         uintptr_t bootstrap_value, int64_t rows, int64_t steps, float gamma, float gae_lambda,
         uintptr_t advantages, uintptr_t returns, uintptr_t stream) {
        py::gil_scoped_release release;
        gae(pointer<const float>(rewards), pointer<const float>(values), pointer<const bool>(mask),
            pointer<const bool>(dones), pointer<const float>(lambdas),
            pointer<const float>(bootstrap_value), rows, steps, gamma, gae_lambda,
            pointer<float>(advantages), pointer<float>(returns), pointer<void>(stream));
      },
      py::arg("rewards"), py::arg("values"), py::arg("mask"), py::arg("dones"), py::arg("lambdas"),
      py::arg("bootstrap_value"), py::arg("rows"), py::arg("steps"), py::arg("gamma"),
      py::arg("gae_lambda"), py::arg("advantages"), py::arg("returns"), py::arg("stream"),
      "Advantages and returns of contiguous (rows, steps) float32 arrays; mask, dones, lambdas and "
      "bootstrap_value may be absent (0).");
}

void bind_linear_head(py::module_& m) {
  m.def(
      "linear_head_rows",
      [](const py::tuple& logits, uintptr_t token_ids, uintptr_t mask, int64_t rows, int64_t vocab,
         float inv_temperature, float softcap, uintptr_t logprobs, uintptr_t row_stats,
         uintptr_t entropy, const py::tuple& out, const py::tuple& entropy_out, uintptr_t stream) {
        const Rows logits_rows = rows_of(logits), out_rows = rows_of(out),
                   entropy_out_rows = rows_of(entropy_out);
        py::gil_scoped_release release;
        linear_head_rows(logits_rows, pointer<const int64_t>(token_ids), pointer<const bool>(mask),
                         rows, vocab, inv_temperature, softcap, pointer<float>(logprobs),
                         pointer<float>(row_stats), pointer<float>(entropy), out_rows,
                         entropy_out_rows, pointer<void>(stream));
      },
      py::arg("logits"), py::arg("token_ids"), py::arg("mask"), py::arg("rows"), py::arg("vocab"),
      py::arg("inv_temperature"), py::arg("softcap"), py::arg("logprobs"), py::arg("row_stats"),
      py::arg("entropy"), py::arg("out"), py::arg("entropy_out"), py::arg("stream"),
      "Results of float32 rows and, where out's address is not 0, the gradient of each log-prob "
      "(and entropy) with respect to the logits; out may be the logits' own memory.");
  m.def(
      "linear_head_gradient",
      [](const py::tuple& logits, uintptr_t token_ids, uintptr_t mask, int64_t begin, int64_t rows,
         int64_t columns, uintptr_t row_stats, uintptr_t logprobs, uintptr_t entropy,
         uintptr_t dlogprobs, uintptr_t dentropy, float inv_temperature, float softcap,
         const py::tuple& out, uintptr_t stream) {
        const Rows logits_rows = rows_of(logits), out_rows = rows_of(out);
        py::gil_scoped_release release;
        linear_head_gradient(logits_rows, pointer<const int64_t>(token_ids),
                             pointer<const bool>(mask), begin, rows, columns,
                             pointer<const float>(row_stats), pointer<const float>(logprobs),
                             pointer<const float>(entropy), pointer<const float>(dlogprobs),
                             pointer<const float>(dentropy), inv_temperature, softcap, out_rows,
                             pointer<void>(stream));
      },
      py::arg("logits"), py::arg("token_ids"), py::arg("mask"), py::arg("begin"), py::arg("rows"),
      py::arg("columns"), py::arg("row_stats"), py::arg("logprobs"), py::arg("entropy"),
      py::arg("dlogprobs"), py::arg("dentropy"), py::arg("inv_temperature"), py::arg("softcap"),
      py::arg("out"), py::arg("stream"),
      "Gradient of float32 logits that hold the vocabulary's columns from begin on; out may be "
      "the logits' own memory.");
}

void bind_lora_linear(py::module_& m) {
  m.def(
      "lora_dropout",
      [](uintptr_t matrix, int dtype, int64_t rows, int64_t cols, uintptr_t seed,
         uint32_t threshold, uintptr_t stream) {
        py::gil_scoped_release release;
        lora_dropout(pointer<void>(matrix), dtype, rows, cols, pointer<const int64_t>(seed),
                     threshold, pointer<void>(stream));
      },
      py::arg("matrix"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("seed"),
      py::arg("threshold"), py::arg("stream"),
      "Zeroes, in place, the elements of a contiguous matrix whose Philox word is below threshold; "
      "the seed is read from its address.");
  m.def(
      "lora_down",
      [](uintptr_t x, int64_t x_stride, uintptr_t lora_a, int dtype, int64_t rows, int64_t cols,
         int64_t rank, uintptr_t seed, uint32_t threshold, uintptr_t down, uintptr_t stream) {
        py::gil_scoped_release release;
        lora_down(pointer<const void>(x), x_stride, pointer<const void>(lora_a), dtype, rows, cols,
                  rank, pointer<const int64_t>(seed), threshold, pointer<void>(down),
                  pointer<void>(stream));
      },
      py::arg("x"), py::arg("x_stride"), py::arg("lora_a"), py::arg("dtype"), py::arg("rows"),
      py::arg("cols"), py::arg("rank"), py::arg("seed"), py::arg("threshold"), py::arg("down"),
      py::arg("stream"),
      "down (rows, rank) = D(x) lora_a^T in bfloat16 or float16, with the dropout D of "
      "lora_dropout; "
      "none if the seed's address is 0.");
  m.def(
      "lora_da",
      [](uintptr_t x, int64_t x_stride, uintptr_t ddown, int dtype, int64_t rows, int64_t cols,
         int64_t rank, uintptr_t seed, uint32_t threshold, uintptr_t workspace, uintptr_t da,
         uintptr_t stream) {
        py::gil_scoped_release release;
        lora_da(pointer<const void>(x), x_stride, pointer<const void>(ddown), dtype, rows, cols,
                rank, pointer<const int64_t>(seed), threshold, pointer<float>(workspace),
                pointer<void>(da), pointer<void>(stream));
      },
      py::arg("x"), py::arg("x_stride"), py::arg("ddown"), py::arg("dtype"), py::arg("rows"),
      py::arg("cols"), py::arg("rank"), py::arg("seed"), py::arg("threshold"), py::arg("workspace"),
      py::arg("da"), py::arg("stream"),
      "da (rank, cols) = ddown^T D(x), ddown being (rows, rank); as lora_down.");
  m.def("lora_da_workspace", &lora_da_workspace, py::arg("rows"), py::arg("cols"), py::arg("rank"),
        "Floats of workspace that lora_da needs.");
  m.def(
      "lora_dx",
      [](uintptr_t ddown, uintptr_t lora_a, int dtype, int64_t rows, int64_t cols, int64_t rank,
         uintptr_t seed, uint32_t threshold, uintptr_t dx, uintptr_t stream) {
        py::gil_scoped_release release;
        lora_dx(pointer<const void>(ddown), pointer<const void>(lora_a), dtype, rows, cols, rank,
                pointer<const int64_t>(seed), threshold, pointer<void>(dx), pointer<void>(stream));
      },
      py::arg("ddown"), py::arg("lora_a"), py::arg("dtype"), py::arg("rows"), py::arg("cols"),
      py::arg("rank"), py::arg("seed"), py::arg("threshold"), py::arg("dx"), py::arg("stream"),
      "dx (rows, cols) = D(ddown lora_a); as lora_down.");
  m.def(
      "lora_up_backward",
      [](uintptr_t dy, uintptr_t down, int64_t down_stride, uintptr_t lora_b, int dtype,
         int64_t rows, int64_t cols, int64_t rank, float scaling, uintptr_t workspace,
         uintptr_t ddown, int64_t ddown_stride, uintptr_t db, uintptr_t stream) {
        py::gil_scoped_release release;
        lora_up_backward(pointer<const void>(dy), pointer<const void>(down), down_stride,
                         pointer<const void>(lora_b), dtype, rows, cols, rank, scaling,
                         pointer<float>(workspace), pointer<void>(ddown), ddown_stride,
                         pointer<void>(db), pointer<void>(stream));
      },
      py::arg("dy"), py::arg("down"), py::arg("down_stride"), py::arg("lora_b"), py::arg("dtype"),
      py::arg("rows"), py::arg("cols"), py::arg("rank"), py::arg("scaling"), py::arg("workspace"),
      py::arg("ddown"), py::arg("ddown_stride"), py::arg("db"), py::arg("stream"),
      "ddown (rows, rank) = scaling dy lora_b and db (cols, rank) = scaling dy^T down in bfloat16 "
      "or float16, from one reading of dy (rows, cols).");
  m.def("lora_up_backward_workspace", &lora_up_backward_workspace, py::arg("rows"), py::arg("cols"),
        py::arg("rank"), "Floats of workspace that lora_up_backward needs.");
}

void bind_ppo_advantages(py::module_& m) {
  m.def(
      "ppo_advantages",
      [](uintptr_t logprobs, uintptr_t ref_logprobs, uintptr_t values, uintptr_t scores,
         uintptr_t mask, int64_t rows, int64_t steps, float kl_coef, int kl_estimator,
         float kl_clip, float score_clip, float gamma, float gae_lambda, bool center, bool scale,
         uintptr_t advantages, uintptr_t returns, uintptr_t rewards, uintptr_t kl,
         uintptr_t moments, uintptr_t stats, uintptr_t workspace, uintptr_t stream) {
        py::gil_scoped_release release;
        ppo_advantages(pointer<const float>(logprobs), pointer<const float>(ref_logprobs),
                       pointer<const float>(values), pointer<const float>(scores),
                       pointer<const bool>(mask), rows, steps, kl_coef, kl_estimator, kl_clip,
                       score_clip, gamma, gae_lambda, center, scale, pointer<float>(advantages),
                       pointer<float>(returns), pointer<float>(rewards), pointer<float>(kl),
                       pointer<double>(moments), pointer<float>(stats), pointer<double>(workspace),
                       pointer<void>(stream));
      },
      py::arg("logprobs"), py::arg("ref_logprobs"), py::arg("values"), py::arg("scores"),
      py::arg("mask"), py::arg("rows"), py::arg("steps"), py::arg("kl_coef"),
      py::arg("kl_estimator"), py::arg("kl_clip"), py::arg("score_clip"), py::arg("gamma"),
      py::arg("gae_lambda"), py::arg("center"), py::arg("scale"), py::arg("advantages"),
      py::arg("returns"), py::arg("rewards"), py::arg("kl"), py::arg("moments"), py::arg("stats"),
      py::arg("workspace"), py::arg("stream"),
      "Fills advantages (whitened as asked), returns, rewards, kl, moments (n, mean, M2) and "
      "stats, "
      "in the order of AdvantageStats.");
  m.def("ppo_advantages_workspace", &ppo_advantages_workspace, py::arg("rows"),
        "Doubles of workspace that ppo_advantages needs.");
}

void bind_ppo_loss(py::module_& m) {
  m.def(
      "ppo_loss",
      [](uintptr_t logprobs, uintptr_t values, uintptr_t entropy, uintptr_t old_logprobs,
         uintptr_t old_values, uintptr_t advantages, uintptr_t returns, uintptr_t mask,
         uintptr_t denominator, int64_t size, double clip_coef, float vf_clip_coef, float vf_coef,
         float ent_coef, float dual_clip, uintptr_t loss, uintptr_t stats, uintptr_t dlogprobs,
         uintptr_t dvalues, uintptr_t dentropy, uintptr_t workspace, uintptr_t stream) {
        py::gil_scoped_release release;
        ppo_loss(pointer<const float>(logprobs), pointer<const float>(values),
                 pointer<const float>(entropy), pointer<const float>(old_logprobs),
                 pointer<const float>(old_values), pointer<const float>(advantages),
                 pointer<const float>(returns), pointer<const bool>(mask),
                 pointer<const float>(denominator), size, clip_coef, vf_clip_coef, vf_coef,
                 ent_coef, dual_clip, pointer<float>(loss), pointer<float>(stats),
                 pointer<float>(dlogprobs), pointer<float>(dvalues), pointer<float>(dentropy),
                 pointer<double>(workspace), pointer<void>(stream));
      },
      py::arg("logprobs"), py::arg("values"), py::arg("entropy"), py::arg("old_logprobs"),
      py::arg("old_values"), py::arg("advantages"), py::arg("returns"), py::arg("mask"),
      py::arg("denominator"), py::arg("size"), py::arg("clip_coef"), py::arg("vf_clip_coef"),
      py::arg("vf_coef"), py::arg("ent_coef"), py::arg("dual_clip"), py::arg("loss"),
      py::arg("stats"), py::arg("dlogprobs"), py::arg("dvalues"), py::arg("dentropy"),
      py::arg("workspace"), py::arg("stream"),
      "Fills loss, stats (in the order of PPOStats) and the gradients that are wanted (0 = "
      "absent); "
      "without a denominator sums are divided by the number of kept tokens.");
  m.def("ppo_loss_workspace", &ppo_loss_workspace, py::arg("size"),
        "Doubles of workspace that ppo_loss needs.");
}

void bind_ranking_loss(py::module_& m) {
  m.def(
      "ranking_loss",
      [](uintptr_t scores, uintptr_t group_ids, uintptr_t ranks, uintptr_t margins, int64_t size,
         float center_coef, uintptr_t loss, uintptr_t stats, uintptr_t dscores, uintptr_t workspace,
         uintptr_t stream) {
        py::gil_scoped_release release;
        ranking_loss(pointer<const float>(scores), pointer<const int64_t>(group_ids),
                     pointer<const double>(ranks), pointer<const float>(margins), size, center_coef,
                     pointer<float>(loss), pointer<float>(stats), pointer<float>(dscores),
                     pointer<double>(workspace), pointer<void>(stream));
      },
      py::arg("scores"), py::arg("group_ids"), py::arg("ranks"), py::arg("margins"),
      py::arg("size"), py::arg("center_coef"), py::arg("loss"), py::arg("stats"),
      py::arg("dscores"), py::arg("workspace"), py::arg("stream"),
      "Fills loss, stats (in the order of RankingStats) and the gradient of the scores; margins "
      "may "
      "be absent (0). A rank that is NaN makes the loss NaN.");
  m.def("ranking_loss_workspace", &ranking_loss_workspace, py::arg("size"),
        "Doubles of workspace that ranking_loss needs.");
}

void bind_token_logprobs(py::module_& m) {
  m.def("token_logprobs_workspace", &token_logprobs_workspace, py::arg("rows"), py::arg("vocab"),
        py::arg("dtype"), "Bytes of workspace that the forward needs; 0 for none.");
  m.def(
      "token_logprobs_fwd",
      [](const py::tuple& logits, uintptr_t token_ids, uintptr_t mask, int64_t rows, int64_t vocab,
         float inv_temperature, float softcap, uintptr_t logprobs, uintptr_t row_stats,
         uintptr_t entropy, uintptr_t workspace, uintptr_t stream) {
        const Rows logits_rows = rows_of(logits);
        py::gil_scoped_release release;
        token_logprobs_fwd(
            logits_rows, pointer<const int64_t>(token_ids), pointer<const bool>(mask), rows, vocab,
            inv_temperature, softcap, pointer<float>(logprobs), pointer<float>(row_stats),
            pointer<float>(entropy), pointer<void>(workspace), pointer<void>(stream));
      },
      py::arg("logits"), py::arg("token_ids"), py::arg("mask"), py::arg("rows"), py::arg("vocab"),
      py::arg("inv_temperature"), py::arg("softcap"), py::arg("logprobs"), py::arg("row_stats"),
      py::arg("entropy"), py::arg("workspace"), py::arg("stream"),
      "Log-prob of each token, (max, log-sum) of each row and, if entropy is not 0, its "
      "entropy.");
  m.def(
      "token_logprobs_bwd",
      [](const py::tuple& logits, uintptr_t token_ids, uintptr_t mask, uintptr_t row_stats,
         uintptr_t logprobs, uintptr_t entropy, uintptr_t dlogprobs, uintptr_t dentropy,
         int64_t rows, int64_t vocab, float inv_temperature, float softcap,
         const py::tuple& dlogits, uintptr_t stream) {
        const Rows logits_rows = rows_of(logits), dlogits_rows = rows_of(dlogits);
        py::gil_scoped_release release;
        token_logprobs_bwd(logits_rows, pointer<const int64_t>(token_ids),
                           pointer<const bool>(mask), pointer<const float>(row_stats),
                           pointer<const float>(logprobs), pointer<const float>(entropy),
                           pointer<const float>(dlogprobs), pointer<const float>(dentropy), rows,
                           vocab, inv_temperature, softcap, dlogits_rows, pointer<void>(stream));
      },
      py::arg("logits"), py::arg("token_ids"), py::arg("mask"), py::arg("row_stats"),
      py::arg("logprobs"), py::arg("entropy"), py::arg("dlogprobs"), py::arg("dentropy"),
      py::arg("rows"), py::arg("vocab"), py::arg("inv_temperature"), py::arg("softcap"),
      py::arg("dlogits"), py::arg("stream"),
      "Gradient of the logits; dlogits may be the logits' own memory.");
}

}  // namespace

void bind(py::module_& m) {
  bind_gae(m);
  bind_linear_head(m);
  bind_lora_linear(m);
  bind_ppo_advantages(m);
  bind_ppo_loss(m);
  bind_ranking_loss(m);
  bind_token_logprobs(m);
}

}  // namespace fastrl::cuda
