//! GELU, exact (`x Phi(x)`, the experts) and by tanh (the dense blocks), each with its derivative.

use crate::isa::Isa;
use crate::math::{logistic, normal_cdf, normal_pdf};

/// 2 sqrt(2 / pi). The approximation `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))` is computed as the same function
/// `x s(2 sqrt(2/pi) (x + 0.044715 x^3))`, s the logistic function, in which nothing cancels.
const TWO_SQRT_2_OVER_PI: f32 = 1.595_769_1;
const CUBIC: f32 = 0.044_715;

#[inline(always)]
pub(crate) fn gelu_erf<I: Isa>(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    for (y, &x) in y.iter_mut().zip(x) {
        *y = x * normal_cdf::<I>(x);
    }
}

#[inline(always)]
pub(crate) fn gelu_erf_backward<I: Isa>(x: &[f32], grad: &mut [f32]) {
    assert_eq!(x.len(), grad.len());
    for (grad, &x) in grad.iter_mut().zip(x) {
        *grad *= I::madd(x, normal_pdf::<I>(x), normal_cdf::<I>(x));
    }
}

#[inline(always)]
pub(crate) fn gelu_tanh<I: Isa>(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    for (y, &x) in y.iter_mut().zip(x) {
        let (s, _) = logistic::<I>(TWO_SQRT_2_OVER_PI * I::madd(CUBIC * x * x, x, x));
        *y = x * s;
    }
}

#[inline(always)]
pub(crate) fn gelu_tanh_backward<I: Isa>(x: &[f32], grad: &mut [f32]) {
    assert_eq!(x.len(), grad.len());
    for (grad, &x) in grad.iter_mut().zip(x) {
        let (s, slope) = logistic::<I>(TWO_SQRT_2_OVER_PI * I::madd(CUBIC * x * x, x, x));
        let inner = TWO_SQRT_2_OVER_PI * I::madd(3.0 * CUBIC * x, x, 1.0);
        *grad *= I::madd(x * slope, inner, s);
    }
}

#[cfg(test)]
mod tests {
    use crate::Kernels;
    use crate::math::reference;

    fn sweep() -> Vec<f32> {
        (-6000..=6000).map(|i| i as f32 * 0.002).chain([-100.0, -30.0, -14.0, 14.0, 30.0, 1e4]).collect()
    }

    fn check(name: &str, op: impl Fn(&Kernels, &[f32]) -> Vec<f32>, want: impl Fn(f64) -> f64) {
        let x = sweep();
        for k in Kernels::supported() {
            for (&x, got) in x.iter().zip(op(k, &x)) {
                let want = want(f64::from(x));
                // 5e-7 absolute near 0, the same relative to the result further out.
                let bound = 5e-7 * want.abs().max(1.0);
                assert!((f64::from(got) - want).abs() <= bound, "{name} {}: {x}: {got} for {want}", k.isa());
            }
        }
    }

    fn forward(op: fn(&Kernels, &[f32], &mut [f32])) -> impl Fn(&Kernels, &[f32]) -> Vec<f32> {
        move |k, x| {
            let mut y = vec![0.0; x.len()];
            op(k, x, &mut y);
            y
        }
    }

    fn backward(op: fn(&Kernels, &[f32], &mut [f32])) -> impl Fn(&Kernels, &[f32]) -> Vec<f32> {
        move |k, x| {
            let mut grad = vec![2.0; x.len()];
            op(k, x, &mut grad);
            grad.iter().map(|g| g / 2.0).collect()
        }
    }

    fn tanh_form(x: f64) -> f64 {
        0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
    }

    /// Central difference, exact to about 1e-9 here.
    fn slope(f: impl Fn(f64) -> f64) -> impl Fn(f64) -> f64 {
        move |x| (f(x + 1e-5) - f(x - 1e-5)) / 2e-5
    }

    #[test]
    fn both_forms_are_within_5e_7_of_f64() {
        check("erf", forward(Kernels::gelu_erf), |x| x * reference::normal_cdf(x));
        check("tanh", forward(Kernels::gelu_tanh), tanh_form);
    }

    #[test]
    fn both_derivatives_are_within_5e_7_of_f64_and_scale_the_gradient() {
        check("erf", backward(Kernels::gelu_erf_backward), slope(|x| x * reference::normal_cdf(x)));
        check("tanh", backward(Kernels::gelu_tanh_backward), slope(tanh_form));
    }
}
