//! Which choices experts take: sorted by expert, up to a capacity.

use std::sync::Arc;

use super::routing::{Queues, RoutingShape, has};
use super::view::View;
use crate::args;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Grid, Kernel, Module};
use crate::stream::Stream;

const PTX: &str = include_str!("../../ptx/train_dispatch.ptx");
/// Warps of a block, at most.
const MOST_WARPS: usize = 32;

/// Lists tokens by the experts they chose.
#[derive(Debug)]
pub struct Dispatch {
    kernel: Kernel,
}

impl Dispatch {
    /// # Errors
    /// [`crate::Error::Kernel`], [`crate::Error::Call`].
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        Ok(Self { kernel: Module::load(gpu, PTX)?.kernel("dispatch_choices")? })
    }

    /// Fills `queues`: every token's first choice in order, then the second choices, and so on, up to `capacity` tokens an expert, or
    /// without end. `chosen` [n_token, k] are experts, different ones of each token, and `loads` [n_expert] counts them.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// At a length that is not that of `shape`.
    pub fn forward(
        &self,
        stream: &Stream,
        shape: RoutingShape,
        chosen: View<u32>,
        loads: View<u32>,
        capacity: Option<u32>,
        queues: &Queues,
    ) -> Result<()> {
        queues.check(shape);
        has("choices", chosen, shape.n_choice());
        has("loads", loads, shape.n_expert);
        let RoutingShape { n_token, n_expert, k } = shape;
        let threads = 32 * n_token.div_ceil(32).min(MOST_WARPS) as u32;
        let grid = Grid { blocks: [n_expert as u32, 1, 1], threads, shared: 0 };
        let Queues { kept, starts, token_of_kept, position, n_dropped } = *queues;
        let sizes = [n_token, n_expert, k].map(|n| n as u32);
        let capacity = capacity.unwrap_or(u32::MAX);
        let [n_token, n_expert, k] = sizes;
        let args =
            args![chosen, loads, capacity, kept, starts, token_of_kept, position, n_dropped, n_token, n_expert, k];
        // SAFETY: the kernel's arguments, of lengths that were checked; loads that count the choices give places within `kept`.
        unsafe { self.kernel.launch(stream, grid, &args) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::testing::{Random, gpu};
    use param_cuda_emulation::Schedule;
    use proptest::prelude::*;

    /// The experts of a token, which are often the first ones if `skewed`.
    fn choices(random: &mut Random, shape: RoutingShape, skewed: bool) -> Vec<u32> {
        let mut left: Vec<u32> = (0..shape.n_expert as u32).collect();
        let mut chosen = Vec::new();
        for _ in 0..shape.k {
            let most = if skewed { left.len().min(1 + random.below(2)) } else { left.len() };
            chosen.push(left.remove(random.below(most)));
        }
        chosen
    }

    /// What the queues are to be.
    struct Expected {
        kept: Vec<u32>,
        starts: Vec<u32>,
        position: Vec<u32>,
    }

    /// The rule as it is told: slot by slot in the order of tokens, then sorted.
    fn fill(shape: RoutingShape, chosen: &[u32], capacity: usize) -> Expected {
        let RoutingShape { n_token, n_expert, k } = shape;
        let mut queues = vec![Vec::new(); n_expert];
        for slot in 0..k {
            for token in 0..n_token {
                let queue = &mut queues[chosen[token * k + slot] as usize];
                if queue.len() < capacity {
                    queue.push((token * k + slot) as u32);
                }
            }
        }
        let (mut starts, mut position) = (vec![0], vec![u32::MAX; chosen.len()]);
        for queue in &mut queues {
            queue.sort_unstable();
            starts.push(starts.last().unwrap() + queue.len() as u32);
        }
        let kept = queues.concat();
        for (at, &choice) in kept.iter().enumerate() {
            position[choice as usize] = at as u32;
        }
        Expected { kept, starts, position }
    }

    fn check(shape: RoutingShape, capacity: Option<u32>, skewed: bool, seed: u64, schedule: Schedule) {
        let gpu = gpu();
        let stream = Stream::new(&gpu).unwrap();
        let random = &mut Random::new(seed);
        let chosen: Vec<u32> = (0..shape.n_token).flat_map(|_| choices(random, shape, skewed)).collect();
        let mut loads = vec![0; shape.n_expert];
        chosen.iter().for_each(|&e| loads[e as usize] += 1);
        let want = fill(shape, &chosen, capacity.map_or(usize::MAX, |n| n as usize));

        let [given, counted] = [&chosen, &loads].map(|x| gpu.upload("", x).unwrap());
        let n = shape.n_choice();
        let [kept, starts, tokens, position, n_dropped] =
            [n, shape.n_expert + 1, n, n, 1].map(|n| gpu.upload("", &vec![77u32; n]).unwrap());
        let queues = Queues {
            kept: kept.view(),
            starts: starts.view(),
            token_of_kept: tokens.view(),
            position: position.view(),
            n_dropped: n_dropped.view(),
        };
        param_cuda_emulation::schedule(Some(schedule));
        Dispatch::new(&gpu).unwrap().forward(&stream, shape, given.view(), counted.view(), capacity, &queues).unwrap();
        param_cuda_emulation::schedule(None);
        let n_kept = want.kept.len();
        let kept = kept.to_vec().unwrap();
        assert_eq!(starts.to_vec().unwrap(), want.starts);
        assert_eq!(kept[..n_kept], want.kept);
        assert!(kept[n_kept..].iter().all(|&choice| choice == 77), "beyond what is kept");
        let of_kept: Vec<u32> = want.kept.iter().map(|choice| choice / shape.k as u32).collect();
        assert_eq!(tokens.to_vec().unwrap()[..n_kept], of_kept);
        assert_eq!(position.to_vec().unwrap(), want.position);
        assert_eq!(n_dropped.to_vec().unwrap(), [(n - n_kept) as u32]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn queues_fill_as_the_rule_says(
            n_token in 1usize..300,
            n_expert in proptest::sample::select(vec![1, 2, 3, 8, 13, 40]),
            k in 1usize..9,
            factor in proptest::option::of(0.0f64..2.0),
            skewed in any::<bool>(),
            seed in any::<u64>(),
            schedule in proptest::sample::select(Schedule::ALL.to_vec()),
        ) {
            let shape = RoutingShape { n_token, n_expert, k: k.min(n_expert) };
            let capacity = factor.map(|factor| (factor * shape.n_choice() as f64 / n_expert as f64) as u32);
            check(shape, capacity, skewed, seed, schedule);
        }
    }

    #[test]
    fn a_warp_lists_more_tokens_than_it_reads_at_once() {
        let shape = RoutingShape { n_token: 4500, n_expert: 3, k: 2 };
        for (capacity, schedule) in [(None, Schedule::Ascending), (Some(2600), Schedule::Reversed)] {
            check(shape, capacity, true, 3, schedule);
        }
    }
}
