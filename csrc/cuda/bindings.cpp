// Every function of fastrl._C.cuda, as in ../bindings.cpp. The GIL is released because a launch
// waits where the GPU's queue is full.
#include "bindings.h"

#include "../python.h"
#include "ops.h"

namespace fastrl::cuda {

void bind(pybind11::module_& m) {
  m.def("gae", kernel(gae), "Advantages and returns; what is None is absent.");
  m.def("linear_head_rows", kernel(linear_head_rows),
        "Results of float32 rows and, where asked, gradients with respect to the logits.");
  m.def("linear_head_on_chip", linear_head_on_chip,
        "Whether linear_head_rows may write gradients of 16 bits over their logits.");
  m.def("linear_head_gradient", kernel(linear_head_gradient),
        "Gradient of float32 logits that hold the vocabulary's columns from begin on.");
  m.def("lora_dropout", kernel(lora_dropout),
        "Zeroes, in place, the elements of a contiguous matrix whose Philox word is too small.");
  m.def("lora_down", kernel(lora_down), "down = D(x) lora_a^T");
  m.def("lora_da", kernel(lora_da), "da = ddown^T D(x)");
  m.def("lora_da_workspace", lora_da_workspace, "Floats of workspace that lora_da needs.");
  m.def("lora_dx", kernel(lora_dx), "dx = D(ddown lora_a)");
  m.def("lora_up_backward", kernel(lora_up_backward),
        "ddown = scaling dy lora_b and db = scaling dy^T down, from one reading of dy.");
  m.def("lora_up_backward_workspace", lora_up_backward_workspace, "As lora_da_workspace.");
  m.def("ppo_advantages", kernel(ppo_advantages), "As the CPU's.");
  m.def("ppo_advantages_workspace", ppo_advantages_workspace, "Doubles of workspace.");
  m.def("ppo_loss", kernel(ppo_loss), "As the CPU's.");
  m.def("ppo_loss_workspace", ppo_loss_workspace, "Doubles of workspace.");
  m.def("scale_gradient", kernel(scale_gradient), "Multiplies in place, unless by 1.");
  m.def("token_logprobs_fwd", kernel(token_logprobs_fwd), "As the CPU's.");
  m.def("token_logprobs_bwd", kernel(token_logprobs_bwd), "As the CPU's.");
  m.def("token_logprobs_workspace", token_logprobs_workspace, "Bytes of workspace; 0 for none.");
}

}  // namespace fastrl::cuda
