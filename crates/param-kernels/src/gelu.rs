//! GELU, exact (`x Phi(x)`, the experts) and by tanh (the dense blocks), each with its derivative.

use crate::isa::Isa;
use crate::math::{erf, logistic, normal_cdf, normal_pdf};

/// 2 sqrt(2 / pi). The approximation `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))` is computed as the same function
/// `x s(2 sqrt(2/pi) (x + 0.044715 x^3))`, s the logistic function, in which nothing cancels.
const TWO_SQRT_2_OVER_PI: f32 = 1.595_769_1;
const CUBIC: f32 = 0.044_715;

#[inline(always)]
fn erf_form<I: Isa>(x: f32) -> f32 {
    let half = 0.5 * x;
    I::madd(half, erf::<I>(x * std::f32::consts::FRAC_1_SQRT_2), half)
}

#[inline(always)]
fn tanh_form<I: Isa>(x: f32) -> f32 {
    let (s, _) = logistic::<I>(TWO_SQRT_2_OVER_PI * I::madd(CUBIC * x * x, x, x));
    x * s
}

#[inline(always)]
pub(crate) fn bias_gelu_erf<I: Isa>(bias: &[f32], width: usize, x: &mut [f32]) {
    add_and_map(bias, width, x, erf_form::<I>);
}

#[inline(always)]
pub(crate) fn bias_gelu_tanh<I: Isa>(bias: &[f32], width: usize, x: &mut [f32]) {
    add_and_map(bias, width, x, tanh_form::<I>);
}

#[inline(always)]
fn add_and_map(bias: &[f32], width: usize, x: &mut [f32], f: impl Fn(f32) -> f32) {
    assert!(width > 0 && x.len().is_multiple_of(width) && bias.len() <= width);
    for row in x.chunks_exact_mut(width) {
        for (x, bias) in row[..bias.len()].iter_mut().zip(bias) {
            *x = f(*x + bias);
        }
    }
}

#[inline(always)]
pub(crate) fn gelu_erf_backward<I: Isa>(x: &mut [f32], grad: &mut [f32]) {
    assert_eq!(x.len(), grad.len());
    for (grad, x) in grad.iter_mut().zip(x) {
        let cdf = normal_cdf::<I>(*x);
        *grad *= I::madd(*x, normal_pdf::<I>(*x), cdf);
        *x *= cdf;
    }
}

#[inline(always)]
pub(crate) fn gelu_tanh_backward<I: Isa>(x: &mut [f32], grad: &mut [f32]) {
    assert_eq!(x.len(), grad.len());
    for (grad, x) in grad.iter_mut().zip(x) {
        let (s, slope) = logistic::<I>(TWO_SQRT_2_OVER_PI * I::madd(CUBIC * *x * *x, *x, *x));
        let inner = TWO_SQRT_2_OVER_PI * I::madd(3.0 * CUBIC * *x, *x, 1.0);
        *grad *= I::madd(*x * slope, inner, s);
        *x *= s;
    }
}

#[cfg(test)]
mod tests {
    use crate::Kernels;
    use crate::math::reference;

    fn sweep() -> Vec<f32> {
        (-6000..=6000).map(|i| i as f32 * 0.002).chain([-100.0, -30.0, -14.0, 14.0, 30.0, 1e4]).collect()
    }

    fn check(name: &str, near_0: f64, op: impl Fn(&Kernels, &[f32]) -> Vec<f32>, want: impl Fn(f64) -> f64) {
        let x = sweep();
        for k in Kernels::supported() {
            for (&x, got) in x.iter().zip(op(k, &x)) {
                let want = want(f64::from(x));
                // Absolute near 0, the same relative to the result further out.
                let bound = near_0 * want.abs().max(1.0);
                assert!((f64::from(got) - want).abs() <= bound, "{name} {}: {x}: {got} for {want}", k.isa());
            }
        }
    }

    /// Forward, in place on top of a bias of nothing.
    fn forward(op: fn(&Kernels, &[f32], usize, &mut [f32])) -> impl Fn(&Kernels, &[f32]) -> Vec<f32> {
        move |k, x| {
            let mut y = x.to_vec();
            op(k, &vec![0.0; x.len()], x.len(), &mut y);
            y
        }
    }

    type Backward = fn(&Kernels, &mut [f32], &mut [f32]);

    fn slope_of(op: Backward) -> impl Fn(&Kernels, &[f32]) -> Vec<f32> {
        move |k, x| {
            let mut grad = vec![2.0; x.len()];
            op(k, &mut x.to_vec(), &mut grad);
            grad.iter().map(|g| g / 2.0).collect()
        }
    }

    fn value_of(op: Backward) -> impl Fn(&Kernels, &[f32]) -> Vec<f32> {
        move |k, x| {
            let mut y = x.to_vec();
            op(k, &mut y, &mut vec![2.0; x.len()]);
            y
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
    fn both_forms_are_close_to_f64() {
        check("erf", 1e-6, forward(Kernels::bias_gelu_erf), |x| x * reference::normal_cdf(x));
        check("tanh", 5e-7, forward(Kernels::bias_gelu_tanh), tanh_form);
    }

    #[test]
    fn a_bias_is_added_first_and_padding_is_left_alone() {
        let (bias, x) = ([0.25, -1.5, 3.0], [1.0, 2.0, -0.5, 7.0, -3.0, 0.0, 0.125, 7.0]);
        for k in Kernels::supported() {
            for op in [Kernels::bias_gelu_erf as fn(&Kernels, &[f32], usize, &mut [f32]), Kernels::bias_gelu_tanh] {
                let mut got = x;
                op(k, &bias, 4, &mut got);
                for (row, x) in got.chunks(4).zip(x.chunks(4)) {
                    let mut want: Vec<f32> = x.iter().zip(bias).map(|(x, b)| x + b).collect();
                    op(k, &[0.0; 3], 3, &mut want);
                    assert_eq!((&row[..3], row[3]), (&want[..], 7.0), "{}", k.isa());
                }
            }
        }
    }

    #[test]
    fn both_derivatives_are_within_5e_7_of_f64_and_scale_the_gradient() {
        check("erf", 5e-7, slope_of(Kernels::gelu_erf_backward), slope(|x| x * reference::normal_cdf(x)));
        check("tanh", 5e-7, slope_of(Kernels::gelu_tanh_backward), slope(tanh_form));
        check("erf", 1e-6, value_of(Kernels::gelu_erf_backward), |x| x * reference::normal_cdf(x));
        check("tanh", 5e-7, value_of(Kernels::gelu_tanh_backward), tanh_form);
    }
}
