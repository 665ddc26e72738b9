// Every function of fastrl._C. Pointers and streams come in as integers: the module includes no
// torch header. Python (fastrl/ops) has validated shapes and allocated the outputs; the GIL is
// released while kernels run.

#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "memory.h"
#include "pointers.h"

#define FASTRL_ISA baseline
#include "ops.h"
#undef FASTRL_ISA
#if defined(__x86_64__)
#define FASTRL_ISA avx2
#include "ops.h"
#undef FASTRL_ISA
#define FASTRL_ISA avx512
#include "ops.h"
#undef FASTRL_ISA
#endif

#ifdef FASTRL_WITH_CUDA
#include "cuda/bindings.h"
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace fastrl;
using fastrl::cpu::active_isa;
using fastrl::cpu::Isa;

namespace {

// Calls cpu::<isa>::op(...) for the instruction set in use.
#if defined(__x86_64__)
#define FASTRL_CALL(op, ...)                                  \
  (active_isa() == Isa::avx512 ? cpu::avx512::op(__VA_ARGS__) \
   : active_isa() == Isa::avx2 ? cpu::avx2::op(__VA_ARGS__)   \
                               : cpu::baseline::op(__VA_ARGS__))
#else
#define FASTRL_CALL(op, ...) cpu::baseline::op(__VA_ARGS__)
#endif

void linear_head_begin(const py::tuple& x, const py::tuple& targets, int64_t rows, int64_t width,
                       float softcap, uintptr_t sweeps, int threads) {
  Rows x_rows = rows_of(x), targets_rows = rows_of(targets);
  py::gil_scoped_release release;
  FASTRL_CALL(linear_head_begin, x_rows, targets_rows, rows, width, softcap, pointer<float>(sweeps),
              threads);
}

void linear_head_sweep(const py::tuple& logits, uintptr_t token_ids, int64_t begin, int64_t rows,
                       int64_t columns, float inv_temperature, float softcap, bool with_entropy,
                       bool write, const py::tuple& products, uintptr_t sweeps, int threads) {
  Rows logits_rows = rows_of(logits), products_rows = rows_of(products);
  py::gil_scoped_release release;
  FASTRL_CALL(linear_head_sweep, logits_rows, pointer<const int64_t>(token_ids), begin, rows,
              columns, inv_temperature, softcap, with_entropy, write, products_rows,
              pointer<float>(sweeps), threads);
}

void linear_head_fold(const py::tuple& block, const py::tuple& product_block, uintptr_t sweeps,
                      int64_t rows, int64_t width, uintptr_t sums, uintptr_t weighted,
                      int threads) {
  Rows block_rows = rows_of(block), product_block_rows = rows_of(product_block);
  py::gil_scoped_release release;
  FASTRL_CALL(linear_head_fold, block_rows, product_block_rows, pointer<const float>(sweeps), rows,
              width, pointer<float>(sums), pointer<float>(weighted), threads);
}

void linear_head_finish(uintptr_t sweeps, int64_t rows, float inv_temperature, float softcap,
                        uintptr_t logprobs, uintptr_t row_stats, uintptr_t entropy,
                        uintptr_t coefficients, uintptr_t entropy_coefficients) {
  py::gil_scoped_release release;
  FASTRL_CALL(linear_head_finish, pointer<const float>(sweeps), rows, inv_temperature, softcap,
              pointer<float>(logprobs), pointer<float>(row_stats), pointer<float>(entropy),
              pointer<float>(coefficients), pointer<float>(entropy_coefficients));
}

void linear_head_direction(const py::tuple& targets, uintptr_t sums, uintptr_t weighted,
                           uintptr_t coefficients, int64_t rows, int64_t width, uintptr_t out,
                           int threads) {
  Rows targets_rows = rows_of(targets);
  py::gil_scoped_release release;
  FASTRL_CALL(linear_head_direction, targets_rows, pointer<const float>(sums),
              pointer<const float>(weighted), pointer<const float>(coefficients), rows, width,
              pointer<float>(out), threads);
}

void linear_head_gradient(const py::tuple& logits, uintptr_t token_ids, int64_t begin, int64_t rows,
                          int64_t columns, uintptr_t row_stats, uintptr_t logprobs,
                          uintptr_t entropy, uintptr_t dlogprobs, uintptr_t dentropy,
                          float inv_temperature, float softcap, int threads) {
  Rows logits_rows = rows_of(logits);
  py::gil_scoped_release release;
  FASTRL_CALL(linear_head_gradient, logits_rows, pointer<const int64_t>(token_ids), begin, rows,
              columns, pointer<const float>(row_stats), pointer<const float>(logprobs),
              pointer<const float>(entropy), pointer<const float>(dlogprobs),
              pointer<const float>(dentropy), inv_temperature, softcap, threads);
}

void linear_head_scale(const py::tuple& direction, const py::tuple& entropy_direction,
                       uintptr_t mask, uintptr_t dlogprobs, uintptr_t dentropy, int64_t rows,
                       int64_t width, const py::tuple& dhidden, int threads) {
  Rows direction_rows = rows_of(direction), entropy_direction_rows = rows_of(entropy_direction),
       dhidden_rows = rows_of(dhidden);
  py::gil_scoped_release release;
  FASTRL_CALL(linear_head_scale, direction_rows, entropy_direction_rows, pointer<const bool>(mask),
              pointer<const float>(dlogprobs), pointer<const float>(dentropy), rows, width,
              dhidden_rows, threads);
}

void lora_dropout(uintptr_t matrix, int dtype, int64_t rows, int64_t cols, uintptr_t seed,
                  uint32_t threshold, int threads) {
  py::gil_scoped_release release;
  FASTRL_CALL(lora_dropout, pointer<void>(matrix), dtype, rows, cols, pointer<const int64_t>(seed),
              threshold, threads);
}

void gae(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t dones, uintptr_t lambdas,
         uintptr_t bootstrap_value, int64_t rows, int64_t steps, float gamma, float gae_lambda,
         uintptr_t advantages, uintptr_t returns, int threads) {
  py::gil_scoped_release release;
  FASTRL_CALL(gae, pointer<const float>(rewards), pointer<const float>(values),
              pointer<const bool>(mask), pointer<const bool>(dones), pointer<const float>(lambdas),
              pointer<const float>(bootstrap_value), rows, steps, gamma, gae_lambda,
              pointer<float>(advantages), pointer<float>(returns), threads);
}

void ppo_advantages(uintptr_t logprobs, uintptr_t ref_logprobs, uintptr_t values, uintptr_t scores,
                    uintptr_t mask, int64_t rows, int64_t steps, float kl_coef, int kl_estimator,
                    float kl_clip, float score_clip, float gamma, float gae_lambda, bool center,
                    bool scale, uintptr_t advantages, uintptr_t returns, uintptr_t rewards,
                    uintptr_t kl, uintptr_t moments, uintptr_t stats, int threads) {
  py::gil_scoped_release release;
  FASTRL_CALL(ppo_advantages, pointer<const float>(logprobs), pointer<const float>(ref_logprobs),
              pointer<const float>(values), pointer<const float>(scores), pointer<const bool>(mask),
              rows, steps, kl_coef, kl_estimator, kl_clip, score_clip, gamma, gae_lambda, center,
              scale, pointer<float>(advantages), pointer<float>(returns), pointer<float>(rewards),
              pointer<float>(kl), pointer<double>(moments), pointer<float>(stats), threads);
}

void ppo_loss(uintptr_t logprobs, uintptr_t values, uintptr_t entropy, uintptr_t old_logprobs,
              uintptr_t old_values, uintptr_t advantages, uintptr_t returns, uintptr_t mask,
              uintptr_t denominator, int64_t size, double clip_coef, float vf_clip_coef,
              float vf_coef, float ent_coef, float dual_clip, uintptr_t loss, uintptr_t stats,
              uintptr_t dlogprobs, uintptr_t dvalues, uintptr_t dentropy, int threads) {
  py::gil_scoped_release release;
  FASTRL_CALL(ppo_loss, pointer<const float>(logprobs), pointer<const float>(values),
              pointer<const float>(entropy), pointer<const float>(old_logprobs),
              pointer<const float>(old_values), pointer<const float>(advantages),
              pointer<const float>(returns), pointer<const bool>(mask),
              pointer<const float>(denominator), size, clip_coef, vf_clip_coef, vf_coef, ent_coef,
              dual_clip, pointer<float>(loss), pointer<float>(stats), pointer<float>(dlogprobs),
              pointer<float>(dvalues), pointer<float>(dentropy), threads);
}

void ranking_loss(uintptr_t scores, uintptr_t group_ids, uintptr_t ranks, uintptr_t margins,
                  int64_t size, float center_coef, uintptr_t loss, uintptr_t stats,
                  uintptr_t dscores, int threads) {
  py::gil_scoped_release release;
  FASTRL_CALL(ranking_loss, pointer<const float>(scores), pointer<const int64_t>(group_ids),
              pointer<const double>(ranks), pointer<const float>(margins), size, center_coef,
              pointer<float>(loss), pointer<float>(stats), pointer<float>(dscores), threads);
}

void token_logprobs_fwd(const py::tuple& logits, uintptr_t token_ids, uintptr_t mask, int64_t rows,
                        int64_t vocab, float inv_temperature, float softcap, uintptr_t logprobs,
                        uintptr_t row_stats, uintptr_t entropy, int threads) {
  Rows logits_rows = rows_of(logits);
  py::gil_scoped_release release;
  FASTRL_CALL(token_logprobs_fwd, logits_rows, pointer<const int64_t>(token_ids),
              pointer<const bool>(mask), rows, vocab, inv_temperature, softcap,
              pointer<float>(logprobs), pointer<float>(row_stats), pointer<float>(entropy),
              threads);
}

void token_logprobs_bwd(const py::tuple& logits, uintptr_t token_ids, uintptr_t mask,
                        uintptr_t row_stats, uintptr_t logprobs, uintptr_t entropy,
                        uintptr_t dlogprobs, uintptr_t dentropy, int64_t rows, int64_t vocab,
                        float inv_temperature, float softcap, const py::tuple& dlogits,
                        int threads) {
  Rows logits_rows = rows_of(logits), dlogits_rows = rows_of(dlogits);
  py::gil_scoped_release release;
  FASTRL_CALL(token_logprobs_bwd, logits_rows, pointer<const int64_t>(token_ids),
              pointer<const bool>(mask), pointer<const float>(row_stats),
              pointer<const float>(logprobs), pointer<const float>(entropy),
              pointer<const float>(dlogprobs), pointer<const float>(dentropy), rows, vocab,
              inv_temperature, softcap, dlogits_rows, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastrl: raw addresses in, results written in place.";

  m.def(
      "cpu_isa", [] { return cpu::isa_name(active_isa()); },
      "Instruction set in use: avx512, avx2 or baseline (FASTRL_CPU_ISA forces one).");
  m.def(
      "advise_huge_pages",
      [](uintptr_t data, int64_t bytes) { advise_huge_pages(pointer<void>(data), bytes); },
      py::arg("data"), py::arg("bytes"), "Asks for huge pages under a fresh large buffer.");
#ifdef FASTRL_WITH_CUDA
  m.attr("has_cuda") = true;
  m.attr("cuda_architectures") = FASTRL_CUDA_ARCHITECTURES;  // as CMake names them
  m.def("cuda_runtime_version", &cuda::runtime_version,
        "Version of the linked cudart, 13000 = 13.0.");
  m.def("cuda_driver_version", &cuda::driver_version, "Version of the driver; 0 if there is none.");
  m.def("cuda_device_count", &cuda::device_count, "Number of CUDA devices; 0 without a driver.");
  m.def("cuda_probe", &cuda::probe, py::call_guard<py::gil_scoped_release>(),
        "Runs an empty kernel on the current device; CUDA's words on it, 'no error' if it ran.");
  auto submodule = m.def_submodule("cuda", "The CUDA kernels: device addresses and a stream.");
  cuda::bind(submodule);
#else
  m.attr("has_cuda") = false;
#endif

  m.def("linear_head_begin", &linear_head_begin, py::arg("x"), py::arg("targets"), py::arg("rows"),
        py::arg("width"), py::arg("softcap"), py::arg("sweeps"), py::arg("threads"),
        "The target's logit of each row, in fp32, and the start of its sweep over the vocabulary.");
  m.def("linear_head_sweep", &linear_head_sweep, py::arg("logits"), py::arg("token_ids"),
        py::arg("begin"), py::arg("rows"), py::arg("columns"), py::arg("inv_temperature"),
        py::arg("softcap"), py::arg("with_entropy"), py::arg("write"), py::arg("products"),
        py::arg("sweeps"), py::arg("threads"),
        "One block of logits: updates each row's sums; if write, logits become exponentials in "
        "place.");
  m.def(
      "linear_head_fold", &linear_head_fold, py::arg("block"), py::arg("product_block"),
      py::arg("sweeps"), py::arg("rows"), py::arg("width"), py::arg("sums"), py::arg("weighted"),
      py::arg("threads"),
      "Adds a block's products with the weight to the running sums, rescaled to the new maximum.");
  m.def(
      "linear_head_finish", &linear_head_finish, py::arg("sweeps"), py::arg("rows"),
      py::arg("inv_temperature"), py::arg("softcap"), py::arg("logprobs"), py::arg("row_stats"),
      py::arg("entropy"), py::arg("coefficients"), py::arg("entropy_coefficients"),
      "Log-prob, (max, log-sum) and entropy of each row, and the coefficients of its directions.");
  m.def("linear_head_direction", &linear_head_direction, py::arg("targets"), py::arg("sums"),
        py::arg("weighted"), py::arg("coefficients"), py::arg("rows"), py::arg("width"),
        py::arg("out"), py::arg("threads"),
        "Gradient of log-prob or entropy with respect to the hidden state; out may be an input.");
  m.def("linear_head_gradient", &linear_head_gradient, py::arg("logits"), py::arg("token_ids"),
        py::arg("begin"), py::arg("rows"), py::arg("columns"), py::arg("row_stats"),
        py::arg("logprobs"), py::arg("entropy"), py::arg("dlogprobs"), py::arg("dentropy"),
        py::arg("inv_temperature"), py::arg("softcap"), py::arg("threads"),
        "One block of logits becomes its gradient, in place.");
  m.def("linear_head_scale", &linear_head_scale, py::arg("direction"), py::arg("entropy_direction"),
        py::arg("mask"), py::arg("dlogprobs"), py::arg("dentropy"), py::arg("rows"),
        py::arg("width"), py::arg("dhidden"), py::arg("threads"),
        "dhidden = dlogprobs * direction + dentropy * entropy_direction; 0 where masked.");
  m.def("gae", &gae, py::arg("rewards"), py::arg("values"), py::arg("mask"), py::arg("dones"),
        py::arg("lambdas"), py::arg("bootstrap_value"), py::arg("rows"), py::arg("steps"),
        py::arg("gamma"), py::arg("gae_lambda"), py::arg("advantages"), py::arg("returns"),
        py::arg("threads"),
        "Advantages and returns of (rows, steps); lambdas, if not 0, holds one lambda per row.");
  m.def("ppo_advantages", &ppo_advantages, py::arg("logprobs"), py::arg("ref_logprobs"),
        py::arg("values"), py::arg("scores"), py::arg("mask"), py::arg("rows"), py::arg("steps"),
        py::arg("kl_coef"), py::arg("kl_estimator"), py::arg("kl_clip"), py::arg("score_clip"),
        py::arg("gamma"), py::arg("gae_lambda"), py::arg("center"), py::arg("scale"),
        py::arg("advantages"), py::arg("returns"), py::arg("rewards"), py::arg("kl"),
        py::arg("moments"), py::arg("stats"), py::arg("threads"),
        "KL penalty, rewards, GAE, moments (n, mean, M2) and, if center or scale, whitening.");
  m.def("ppo_loss", &ppo_loss, py::arg("logprobs"), py::arg("values"), py::arg("entropy"),
        py::arg("old_logprobs"), py::arg("old_values"), py::arg("advantages"), py::arg("returns"),
        py::arg("mask"), py::arg("denominator"), py::arg("size"), py::arg("clip_coef"),
        py::arg("vf_clip_coef"), py::arg("vf_coef"), py::arg("ent_coef"), py::arg("dual_clip"),
        py::arg("loss"), py::arg("stats"), py::arg("dlogprobs"), py::arg("dvalues"),
        py::arg("dentropy"), py::arg("threads"),
        "Loss, statistics and the gradients whose address is not 0.");
  m.def("ranking_loss", &ranking_loss, py::arg("scores"), py::arg("group_ids"), py::arg("ranks"),
        py::arg("margins"), py::arg("size"), py::arg("center_coef"), py::arg("loss"),
        py::arg("stats"), py::arg("dscores"), py::arg("threads"),
        "Loss, statistics and the gradient of the scores.");
  m.def(
      "lora_dropout", &lora_dropout, py::arg("matrix"), py::arg("dtype"), py::arg("rows"),
      py::arg("cols"), py::arg("seed"), py::arg("threshold"), py::arg("threads"),
      "Zeroes, in place, the elements of a contiguous matrix whose Philox word is below threshold; "
      "the seed is read from its address.");
  m.def(
      "token_logprobs_fwd", &token_logprobs_fwd, py::arg("logits"), py::arg("token_ids"),
      py::arg("mask"), py::arg("rows"), py::arg("vocab"), py::arg("inv_temperature"),
      py::arg("softcap"), py::arg("logprobs"), py::arg("row_stats"), py::arg("entropy"),
      py::arg("threads"),
      "Log-prob of each token, (max, log-sum) of each row and, if entropy is not 0, its entropy.");
  m.def("token_logprobs_bwd", &token_logprobs_bwd, py::arg("logits"), py::arg("token_ids"),
        py::arg("mask"), py::arg("row_stats"), py::arg("logprobs"), py::arg("entropy"),
        py::arg("dlogprobs"), py::arg("dentropy"), py::arg("rows"), py::arg("vocab"),
        py::arg("inv_temperature"), py::arg("softcap"), py::arg("dlogits"), py::arg("threads"),
        "Gradient of the logits; dlogits may be the logits' own memory.");
}
