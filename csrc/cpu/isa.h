// Run-time choice among the instruction sets that every CPU op is compiled for.
#pragma once

namespace fastrl::cpu {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set of this CPU, or the one that FASTRL_CPU_ISA forces.
Isa active_isa();
const char* isa_name(Isa isa);

}  // namespace fastrl::cpu
