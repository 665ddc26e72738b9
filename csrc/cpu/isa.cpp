#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastrl::cpu {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose_isa() {
  Isa best = best_isa();
  const char* forced = std::getenv("FASTRL_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return best;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::string(forced) == isa_name(isa) && isa <= best) return isa;
  }
  throw std::invalid_argument(
      std::string("FASTRL_CPU_ISA: expected baseline, avx2 or avx512, at most ") + isa_name(best) +
      " on this CPU, got " + forced);
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace fastrl::cpu
