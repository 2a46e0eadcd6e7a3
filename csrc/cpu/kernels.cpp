// The table of this instruction set; see kernels.h.
#include "kernels.h"

#include "../core/config.h"

#define LA_JOIN_NAMES(a, b) a##b
#define LA_JOIN(a, b) LA_JOIN_NAMES(a, b)

LA_NAMESPACE_BEGIN

void routed_attention_decode(const RoutedAttentionParams&);
void routed_attention_prefill(const RoutedAttentionParams&);
void routed_attention_backward(const RoutedAttentionBackwardParams&);
void visual_mass(const VisualMassParams&);
void append_visual(const AppendVisualParams&);

LA_NAMESPACE_END

namespace lookagain {

const CpuKernels LA_JOIN(kernels_, LA_ISA) = {
    &LA_ISA::routed_attention_decode, &LA_ISA::routed_attention_prefill,
    &LA_ISA::routed_attention_backward, &LA_ISA::visual_mass, &LA_ISA::append_visual};

}  // namespace lookagain
