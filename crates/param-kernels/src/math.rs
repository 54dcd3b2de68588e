//! Elementary functions without branches or table look-ups, so that loops over them vectorise. Coefficients are our own
//! minimax fits (weighted least squares with Lawson's reweighting); the tests state and check each function's error.

use crate::isa::Isa;

/// 1.5 * 2^23: adding it rounds an f32 of magnitude below 2^22 to an integer held in the low mantissa bits.
const ROUND: f32 = 12_582_912.0;

/// `2^n` for an integer `n` in -126..=127.
#[inline(always)]
fn exp2_int(n: i32) -> f32 {
    f32::from_bits(((n + 127) << 23) as u32)
}

/// Horner's rule; coefficients from the constant term up.
#[inline(always)]
fn poly<I: Isa, const N: usize>(x: f32, c: [f32; N]) -> f32 {
    let mut y = c[N - 1];
    for i in (0..N - 1).rev() {
        y = I::madd(y, x, c[i]);
    }
    y
}

/// Splits `x = n ln 2 + r` with `|r| <= ln 2 / 2` and returns `n` and `e^r - 1` (relative error of the fit 1.1e-8).
#[inline(always)]
fn reduce<I: Isa>(x: f32) -> (i32, f32) {
    let shifted = I::madd(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, the first with enough trailing zeros that n times it is exact.
    let r = I::madd(n, -0.693_359_4, x);
    let r = I::madd(n, 2.121_944_4e-4, r);
    const C: [f32; 6] =
        [1.000000011e+00, 5.000000081e-01, 1.666650522e-01, 4.166624069e-02, 8.369152000e-03, 1.394858167e-03];
    (shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32, r * poly::<I, 6>(r, C))
}

/// `e^x` within 2 ulp; `-inf` gives 0, results below 2^-126 are gradual, above the largest f32 infinite, NaN stays NaN.
#[inline(always)]
pub(crate) fn exp<I: Isa>(x: f32) -> f32 {
    // Beyond these the result is 0 or infinite anyway. Written so that NaN passes through.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let (n, em1) = reduce::<I>(x);
    // Two factors: n reaches -150 and 128, outside the exponents of a normal number.
    let half = n >> 1;
    (em1 + 1.0) * exp2_int(half) * exp2_int(n - half)
}

/// Standard normal cumulative distribution `Phi(x) = (1 + erf(x / sqrt 2)) / 2`, with relative precision in the left tail
/// (2e-5 down to 1e-30) and an absolute error of 3e-7 everywhere. Through `erfc(t) = u e^(P(u) - t^2)`, `u = 1 / (1 + t/2)`.
#[inline(always)]
pub(crate) fn normal_cdf<I: Isa>(x: f32) -> f32 {
    let t = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    // erfc(10.2) underflows.
    let t = if t > 10.2 { 10.2 } else { t };
    let u = 1.0 / I::madd(t, 0.5, 1.0);
    const C: [f32; 10] = [
        -1.265446374e+00,
        9.985917339e-01,
        3.870565910e-01,
        3.234428702e-02,
        8.592598293e-03,
        -9.516021904e-02,
        -6.771565914e-01,
        1.141699228e+00,
        -6.741981550e-01,
        1.436769469e-01,
    ];
    let tail = 0.5 * u * exp::<I>(I::madd(-t, t, poly::<I, 10>(u, C)));
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// Error function, within 4e-7: an odd rational function, 1 from where its difference from 1 is less than half an ulp.
#[inline(always)]
pub(crate) fn erf<I: Isa>(x: f32) -> f32 {
    let t = x.abs();
    let t = if t > 4.0 { 4.0 } else { t };
    let z = t * t;
    const P: [f32; 6] =
        [1.128378061e+00, 2.049347029e-01, 5.463829341e-02, 4.391960881e-03, 2.997247982e-04, 1.941037697e-06];
    const Q: [f32; 6] =
        [1.000000000e+00, 5.149436025e-01, 1.200936688e-01, 1.620505716e-02, 1.316865809e-03, 3.775413970e-05];
    let y = t * poly::<I, 6>(z, P) / poly::<I, 6>(z, Q);
    // NaN is passed on.
    (if y > 1.0 { 1.0 } else { y }).copysign(x)
}

/// Logistic function `s(x) = 1 / (1 + e^-x)` and its derivative `s (1 - s)`, each with relative precision in both tails.
#[inline(always)]
pub(crate) fn logistic<I: Isa>(x: f32) -> (f32, f32) {
    let e = exp::<I>(-x.abs());
    let r = 1.0 / (1.0 + e);
    (if x < 0.0 { e * r } else { r }, e * r * r)
}

/// Standard normal density `e^(-x^2/2) / sqrt(2 pi)`.
#[inline(always)]
pub(crate) fn normal_pdf<I: Isa>(x: f32) -> f32 {
    const FRAC_1_SQRT_2PI: f32 = 0.398_942_3;
    FRAC_1_SQRT_2PI * exp::<I>(-0.5 * x * x)
}

/// Writes `e^x` to `y`. Both of one length.
#[inline(always)]
pub(crate) fn exp_slice<I: Isa>(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    for (y, &x) in y.iter_mut().zip(x) {
        *y = exp::<I>(x);
    }
}

/// f64 twins of what the standard library lacks.
#[cfg(test)]
pub(crate) mod reference {
    /// `erf(x) = 2 Phi(x sqrt 2) - 1`.
    pub(crate) fn erf(x: f64) -> f64 {
        2.0 * normal_cdf(x * std::f64::consts::SQRT_2) - 1.0
    }

    /// `Phi(x)`: the Taylor series near 0, Laplace's continued fraction in the tails.
    pub(crate) fn normal_cdf(x: f64) -> f64 {
        let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
        if x.abs() < 4.0 {
            // Phi(x) = 1/2 + phi(x) (x + x^3/3 + x^5/(3 5) + ...)
            let (mut term, mut sum, mut n) = (x, x, 1.0);
            while term.abs() > 1e-17 * sum.abs() {
                n += 2.0;
                term *= x * x / n;
                sum += term;
            }
            return 0.5 + density * sum;
        }
        let t = x.abs();
        let mut fraction = t;
        for n in (1..=60).rev() {
            fraction = t + f64::from(n) / fraction;
        }
        let tail = density / fraction;
        if x < 0.0 { tail } else { 1.0 - tail }
    }
}

#[cfg(test)]
mod tests {
    use super::reference;
    use crate::Kernels;
    use crate::isa::Baseline;

    /// Distance in units in the last place of `want` rounded to f32 (subnormals count in units of the smallest one).
    fn ulps(got: f32, want: f64) -> f64 {
        let exponent = (want as f32).abs().max(f32::MIN_POSITIVE).log2().floor();
        (f64::from(got) - want).abs() / 2f64.powf(f64::from(exponent) - 23.0)
    }

    fn sweep(from: f32, to: f32) -> Vec<f32> {
        let n = 200_000;
        (0..=n).map(|i| from + (to - from) * (i as f32 / n as f32)).collect()
    }

    #[test]
    fn exp_is_within_2_ulp() {
        let x = sweep(-103.0, 88.7);
        let mut y = vec![0.0; x.len()];
        for k in Kernels::supported() {
            k.exp(&x, &mut y);
            for (&x, &y) in x.iter().zip(&y) {
                assert!(ulps(y, f64::from(x).exp()) <= 2.0, "{}: exp {x} = {y}", k.isa());
            }
        }
    }

    #[test]
    fn exp_keeps_the_special_values() {
        let x = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, 0.0, -1e30, 1e30, 89.0];
        let mut y = [0.0; 7];
        for k in Kernels::supported() {
            k.exp(&x, &mut y);
            assert_eq!(
                (y[0], y[1], y[3], y[4], y[5], y[6]),
                (0.0, f32::INFINITY, 1.0, 0.0, f32::INFINITY, f32::INFINITY)
            );
            assert!(y[2].is_nan());
        }
    }

    #[test]
    fn erf_is_within_4e_7_and_odd() {
        for x in sweep(-6.0, 6.0) {
            let (got, want) = (super::erf::<Baseline>(x), reference::erf(f64::from(x)));
            assert!((f64::from(got) - want).abs() <= 4e-7, "{x}: {got} for {want}");
            assert_eq!(got, -super::erf::<Baseline>(-x));
        }
        assert_eq!(super::erf::<Baseline>(f32::INFINITY), 1.0);
        assert!(super::erf::<Baseline>(f32::NAN).is_nan());
    }

    #[test]
    fn normal_cdf_is_precise_in_both_tails() {
        for x in sweep(-12.0, 12.0) {
            let (got, want) = (f64::from(super::normal_cdf::<Baseline>(x)), reference::normal_cdf(f64::from(x)));
            assert!((got - want).abs() <= 3e-7, "{x}: {got} for {want}");
            if want > 1e-30 {
                assert!((got - want).abs() <= 2e-5 * want, "{x}: {got} for {want}");
            }
        }
        assert_eq!(super::normal_cdf::<Baseline>(-20.0), 0.0);
        assert!(super::normal_cdf::<Baseline>(f32::NAN).is_nan());
    }
}
