// A softmax over keys that arrive in pieces.
//
// The state of one query is (max, sum): the largest logit so far, and the sum of
// exp(logit - max). Whatever was accumulated with weights exp(logit - old max) has to be multiplied
// by the factor that `raise` returns. Two states of disjoint key sets merge the same way. A state
// without any key is (-inf, 0), and all functions keep it free of NaN.
#pragma once

#include <cmath>

#include "config.h"

LA_NAMESPACE_BEGIN

template <typename Real>
struct OnlineSoftmax {
  Real max = -INFINITY;
  Real sum = 0;

  // exp(logit - reference), 0 for a logit of -inf whatever the reference is.
  static LA_HD Real weight(Real logit, Real reference) {
    return logit == -INFINITY ? Real(0) : std::exp(logit - reference);
  }

  // Moves the reference up to at least `logit`; returns the factor for what was accumulated.
  LA_HD Real raise(Real logit) {
    if (!(logit > max)) return Real(1);
    const Real factor = weight(max, logit);
    max = logit;
    sum *= factor;
    return factor;
  }

  // The weight of one more key; call `raise` first.
  LA_HD Real add(Real logit) {
    const Real p = weight(logit, max);
    sum += p;
    return p;
  }

  LA_HD Real inverse_sum() const { return sum > 0 ? Real(1) / sum : Real(0); }
  LA_HD Real lse() const { return sum > 0 ? max + std::log(sum) : Real(-INFINITY); }
};

LA_NAMESPACE_END
