// Rotary offsets (NeoX layout: feature i pairs with feature i + rotary_dim / 2).
//
// A key turned by +shift and a query turned by -shift give the same logit:
//   <q, R(shift) k> = <R(-shift) q, k>
// Angles are products of an integer and a float32 frequency, formed and reduced in double.
#pragma once

#include <cmath>

#include "config.h"

LA_NAMESPACE_BEGIN

// Sine and cosine for |angle| < 2^31, to about 1e-15. Written out instead of calling libm so that
// a loop over frequencies vectorises, and host and device give the same bits.
LA_HD void sine_cosine(double angle, double* sine, double* cosine) {
  // pi / 2 in four parts. The first three have 21 bits each, so their products with n are exact.
  constexpr double kPart0 = 0x1.921fb0p+0, kPart1 = 0x1.5110b0p-22;
  constexpr double kPart2 = 0x1.184690p-44, kPart3 = 0x1.13198a2e03707p-65;
  const double n = std::rint(angle * 0x1.45f306dc9c883p-1);
  const double r = (((angle - n * kPart0) - n * kPart1) - n * kPart2) - n * kPart3;
  const double s = r * r;
  // Taylor to r^15 and r^16; the next terms are below 5e-17 at |r| = pi / 4.
  double odd = -1.0 / 1307674368000;
  odd = odd * s + 1.0 / 6227020800;
  odd = odd * s - 1.0 / 39916800;
  odd = odd * s + 1.0 / 362880;
  odd = odd * s - 1.0 / 5040;
  odd = odd * s + 1.0 / 120;
  odd = odd * s - 1.0 / 6;
  odd = r + r * s * odd;
  double even = 1.0 / 20922789888000;
  even = even * s - 1.0 / 87178291200;
  even = even * s + 1.0 / 479001600;
  even = even * s - 1.0 / 3628800;
  even = even * s + 1.0 / 40320;
  even = even * s - 1.0 / 720;
  even = even * s + 1.0 / 24;
  even = even * s - 0.5;
  even = 1.0 + s * even;
  const double quadrant = n - 4 * std::floor(n * 0.25);
  const bool swap = quadrant == 1 || quadrant == 3;
  const double sine_size = swap ? even : odd;
  const double cosine_size = swap ? odd : even;
  *sine = quadrant >= 2 ? -sine_size : sine_size;
  *cosine = quadrant == 1 || quadrant == 2 ? -cosine_size : cosine_size;
}

// cosine[i], sine[i] of shift * inv_freq[i], i < half.
template <typename Real>
LA_HD void rotation_table(const float* inv_freq, int64_t half, int32_t shift, Real* cosine,
                          Real* sine) {
  for (int64_t i = 0; i < half; ++i) {
    double s, c;
    sine_cosine(static_cast<double>(shift) * static_cast<double>(inv_freq[i]), &s, &c);
    cosine[i] = static_cast<Real>(c);
    sine[i] = static_cast<Real>(s);
  }
}

// out = R(+angle) x for direction +1, R(-angle) x for direction -1; features from 2 * half on are
// copied. `load(i)` gives feature i of x, `store(i, value)` takes feature i of the result.
template <typename Real, typename Load, typename Store>
LA_HD void rotate(const Real* cosine, const Real* sine, int64_t half, int64_t head_dim,
                  int direction, Load load, Store store) {
  const Real sign = direction < 0 ? Real(-1) : Real(1);
  for (int64_t i = 0; i < half; ++i) {
    const Real first = load(i), second = load(i + half);
    store(i, first * cosine[i] - sign * second * sine[i]);
    store(i + half, second * cosine[i] + sign * first * sine[i]);
  }
  for (int64_t i = 2 * half; i < head_dim; ++i) store(i, load(i));
}

LA_NAMESPACE_END
