// Every function of fastrl._C, a statement each: python.h reads the arguments, ops.h says what they
// are. Python (fastrl/ops) has checked shapes and allocated the outputs.

#include "cpu/isa.h"
#include "memory.h"
#include "python.h"

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
#define FASTRL_KERNEL(op) #op, kernel(cpu::baseline::op, cpu::avx2::op, cpu::avx512::op)
#else
#define FASTRL_KERNEL(op) #op, kernel(cpu::baseline::op)
#endif

#ifdef FASTRL_WITH_CUDA
#include "cuda/bindings.h"
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace fastrl;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastrl: tensors in, results written in place; csrc/ops.h.";

  m.def(
      "cpu_isa", [] { return cpu::isa_name(cpu::active_isa()); },
      "Instruction set in use: avx512, avx2 or baseline (FASTRL_CPU_ISA forces one).");
  m.def("advise_huge_pages", kernel(advise_huge_pages), "Asks for huge pages under a new buffer.");
#ifdef FASTRL_WITH_CUDA
  m.attr("has_cuda") = true;
  m.attr("cuda_architectures") = FASTRL_CUDA_ARCHITECTURES;  // as CMake names them
  m.def("cuda_runtime_version", cuda::runtime_version, "The linked cudart's: 13000 = 13.0.");
  m.def("cuda_driver_version", cuda::driver_version, "The driver's; 0 if there is none.");
  m.def("cuda_device_count", cuda::device_count, "Number of CUDA devices; 0 without a driver.");
  m.def("cuda_probe", cuda::probe, py::call_guard<py::gil_scoped_release>(),
        "Runs an empty kernel on the current device; CUDA's words on it, 'no error' if it ran.");
  auto submodule = m.def_submodule("cuda", "The CUDA kernels; csrc/cuda/ops.h.");
  cuda::bind(submodule);
#else
  m.attr("has_cuda") = false;
#endif

  m.def(FASTRL_KERNEL(linear_head_begin),
        "The target's logit of each row, in fp32, and the start of its sweep over the vocabulary.");
  m.def(FASTRL_KERNEL(linear_head_sweep),
        "One block of logits: updates each row's sums and, if not None, top1, false at first; if "
        "write, logits become exponentials.");
  m.def(FASTRL_KERNEL(linear_head_fold),
        "Adds a block's products with the weight to the sums, rescaled to the new maximum.");
  m.def(FASTRL_KERNEL(linear_head_finish),
        "Log-prob, (max, log-sum), entropy and the coefficients of the directions of each row.");
  m.def(FASTRL_KERNEL(linear_head_direction),
        "Gradient of log-prob or entropy with respect to the hidden state; out may be an input.");
  m.def(FASTRL_KERNEL(linear_head_gradient), "One block of logits becomes its gradient, in place.");
  m.def(FASTRL_KERNEL(linear_head_scale),
        "dhidden = dlogprobs * direction + dentropy * entropy_direction; 0 where masked.");
  m.def(FASTRL_KERNEL(lora_dropout),
        "Zeroes, in place, the elements of a contiguous matrix whose Philox word is too small.");
  m.def(FASTRL_KERNEL(gae), "Advantages and returns; lambdas holds one lambda per row.");
  m.def(FASTRL_KERNEL(ppo_advantages),
        "KL penalty, rewards, GAE, moments (n, mean, M2) and, if center or scale, whitening.");
  m.def(FASTRL_KERNEL(ppo_loss), "Loss, statistics and the gradients that are not None.");
  m.def(FASTRL_KERNEL(ranking_loss), "Loss, statistics and the gradient of the scores.");
  m.def(FASTRL_KERNEL(token_logprobs_fwd),
        "Log-prob of each token, (max, log-sum) of each row and, if not None, its entropy and "
        "whether the token is the arg max.");
  m.def(FASTRL_KERNEL(token_logprobs_bwd),
        "Gradient of the logits; dlogits may be the logits' own memory.");
}
