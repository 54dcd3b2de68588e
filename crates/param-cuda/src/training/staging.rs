//! What goes to the GPU for a batch and what comes back of it, through pinned memory, so that the host never waits for the batches before.

use std::sync::Arc;

use bytemuck::Pod;

use super::embedding::sorted;
use super::layout::{Layout, Plan, Span};
use super::learner::Batch;
use super::model::Model;
use super::numbers::Numbers;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::memory::{Buffer, Pinned};
use crate::stream::{Event, Stream};

/// What a batch came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Tokens.
    pub n_token: usize,
    /// Sum over the targets that count, nats.
    pub cross_entropy: f64,
    /// Of each MoE block, in order.
    pub routers: Vec<RouterReport>,
}

/// What a router made of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterReport {
    /// Sum over tokens of the squared log-sum-exp of the logits.
    pub squared_log_sums: f64,
    /// Sum over tokens of the entropy of the softmax over all experts, nats.
    pub entropies: f64,
    /// Sum over tokens of the weights that each expert got, [n_expert].
    pub mass: Vec<f64>,
    /// Tokens that chose each expert, before dropping, [n_expert].
    pub load: Vec<u32>,
    /// Choices that found their expert full.
    pub n_dropped: u32,
}

/// A batch on its way.
struct Slot {
    ids: Pinned<u32>,
    targets: Pinned<i32>,
    order: Pinned<u32>,
    mask: Pinned<u8>,
    first: Pinned<u32>,
    normal: Pinned<f32>,
    numbers: Pinned<Numbers>,
    /// Passed once the GPU has it.
    taken: Option<Event>,
}

/// What comes back of a batch: sums, of which the first adds up over the step, and counts, as [`Layout`] has them.
struct Answer {
    n_token: usize,
    sums: Pinned<f64>,
    counts: Pinned<u32>,
}

/// Both ways of the batches of a step.
pub(super) struct Staging {
    gpu: Arc<Gpu>,
    /// They take turns.
    slots: [Slot; 2],
    answers: Vec<Answer>,
    /// Batches of this step so far, and tokens of the last.
    n_batch: usize,
    n_token: usize,
}

impl Staging {
    pub(super) fn new(gpu: &Arc<Gpu>, model: &Model, plan: &Plan) -> Result<Self> {
        let n = plan.n_token();
        let n_normal = if plan.trains && model.has_noise() { model.n_moe() * n * model.n_expert } else { 0 };
        let what = "batches on their way";
        let slot = || -> Result<Slot> {
            Ok(Slot {
                ids: gpu.pinned(what, n)?,
                targets: gpu.pinned(what, n)?,
                order: gpu.pinned(what, n)?,
                mask: gpu.pinned(what, n)?,
                first: gpu.pinned(what, n)?,
                normal: gpu.pinned(what, n_normal)?,
                numbers: gpu.pinned(what, 1)?,
                taken: None,
            })
        };
        Ok(Self { gpu: Arc::clone(gpu), slots: [slot()?, slot()?], answers: Vec::new(), n_batch: 0, n_token: 0 })
    }

    /// Begins a step.
    pub(super) fn begin(&mut self) {
        self.n_batch = 0;
    }

    /// Queues a batch's way to the GPU.
    ///
    /// # Panics
    /// If it does not fit the model or what was planned.
    pub(super) fn upload(
        &mut self,
        stream: &Stream,
        arena: &Buffer<u8>,
        layout: &Layout,
        numbers_to: &Buffer<Numbers>,
        model: &Model,
        batch: &Batch,
        numbers: Numbers,
    ) -> Result<()> {
        let n = batch.ids.len();
        assert!(
            batch.ids.iter().all(|&id| (id as usize) < model.n_vocab),
            "an id beyond the vocabulary of {}",
            model.n_vocab
        );
        assert!(batch.targets.iter().all(|&id| id < model.n_vocab as i32), "a target beyond the vocabulary");
        assert_eq!(batch.targets.len(), n, "a target for each id");
        let n_col = n / batch.n_row;
        assert!(
            batch.first.is_none_or(|first| (0..n).all(|i| first[i] as usize <= i % n_col)),
            "no position sees what follows it"
        );
        let slot = &mut self.slots[self.n_batch % 2];
        if let Some(taken) = slot.taken.take() {
            taken.synchronize()?;
        }
        let input = &layout.input;
        send(stream, arena, &mut slot.ids, batch.ids, input.ids)?;
        send(stream, arena, &mut slot.targets, batch.targets, input.targets)?;
        send(stream, arena, &mut slot.order, &sorted(batch.ids), input.order)?;
        if let Some(mask) = batch.mask {
            let mask = mask.iter().map(|&real| u8::from(real)).collect::<Vec<_>>();
            send(stream, arena, &mut slot.mask, &mask, input.mask)?;
        }
        if let Some(first) = batch.first {
            send(stream, arena, &mut slot.first, first, input.first)?;
        }
        if let Some(normal) = batch.normal {
            assert_eq!(normal.len(), model.n_moe() * n * model.n_expert, "draws of noise");
            send(stream, arena, &mut slot.normal, normal, input.normal)?;
        }
        slot.numbers.set(0, numbers);
        // SAFETY: the slot is left alone until `taken` has passed, and the learner's buffers outlive its stream's work.
        unsafe { stream.write_later(&slot.numbers, numbers_to.view())? };
        slot.taken = Some(Event::record(stream)?);
        self.n_token = n;
        Ok(())
    }

    /// Queues the way back of the last batch.
    pub(super) fn download(&mut self, stream: &Stream, arena: &Buffer<u8>, layout: &Layout) -> Result<()> {
        let (sums, counts) = (layout.sums.all(arena), layout.counts.all(arena));
        if self.answers.len() == self.n_batch {
            let what = "what batches came to";
            let (sums, counts) = (self.gpu.pinned(what, sums.len())?, self.gpu.pinned(what, counts.len())?);
            self.answers.push(Answer { n_token: 0, sums, counts });
        }
        let answer = &mut self.answers[self.n_batch];
        answer.n_token = self.n_token;
        self.n_batch += 1;
        // SAFETY: the answer is read after the stream was waited for, and written again by its own order alone.
        unsafe {
            stream.read_later(sums, &mut answer.sums)?;
            stream.read_later(counts, &mut answer.counts)
        }
    }

    /// What the batches of the step came to, once the stream has been waited for.
    pub(super) fn reports(&self, model: &Model) -> Vec<Report> {
        let (n_moe, n_expert) = (model.n_moe(), model.n_expert);
        let mut before = 0.0;
        let report = |answer: &Answer| {
            let cross_entropy = answer.sums[0] - before;
            before = answer.sums[0];
            let router = |moe: usize| {
                let statistics = &answer.sums[1 + moe * (2 + n_expert)..][..2 + n_expert];
                RouterReport {
                    squared_log_sums: statistics[0],
                    entropies: statistics[1],
                    mass: statistics[2..].to_vec(),
                    load: answer.counts[moe * n_expert..(moe + 1) * n_expert].to_vec(),
                    n_dropped: answer.counts[n_moe * n_expert + moe],
                }
            };
            Report { n_token: answer.n_token, cross_entropy, routers: (0..n_moe).map(router).collect() }
        };
        self.answers[..self.n_batch].iter().map(report).collect()
    }
}

/// Queues the copy of `data` to the beginning of `to`, through `pinned`.
fn send<T: Pod>(stream: &Stream, arena: &Buffer<u8>, pinned: &mut Pinned<T>, data: &[T], to: Span<T>) -> Result<()> {
    pinned[..data.len()].copy_from_slice(data);
    // SAFETY: as at the numbers of `Staging::upload`.
    unsafe { stream.write_later(pinned, to.view(arena, data.len())) }
}
