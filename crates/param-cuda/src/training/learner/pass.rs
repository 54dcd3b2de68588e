//! A pass over a batch: forward, and back to the gradients of all parameters.

use super::{Learner, Pass, Site, routing_shape};
use crate::error::Result;
use crate::stream::Stream;
use crate::training::attention::AttentionInputs;
use crate::training::dropout::Dropped;
use crate::training::layout::{Backward, Experts, KeptFfn, MatrixSpan, Recompute, Span, Statistics};
use crate::training::model::{FfnPlaces, Model, NormPlaces, Place};
use crate::training::norm::Scores;
use crate::training::numbers::Numbers;
use crate::training::product::{Factor, Groups, Write};
use crate::training::profile::Part;
use crate::training::router::{Gathered, Noise, RouterLosses, Scorer};
use crate::training::routing::{Queues, Routed, RoutingShape};
use crate::training::view::{Rows, View};

impl Learner {
    pub(super) fn param(&self, place: &Place) -> View<'_, f32> {
        self.params.view().part(place.clone())
    }

    fn grad(&self, place: &Place) -> View<'_, f32> {
        self.of_training().grads.view().part(place.clone())
    }

    /// A parameter as products read it.
    pub(super) fn weight(&self, place: &Place, n_row: usize, n_col: usize) -> Rows<'_> {
        let bytes = match &self.bf16 {
            Some(bf16) => bf16.view().part(place.clone()).cast(),
            None => self.param(place).cast(),
        };
        Rows::new(bytes, self.plan.element(), n_row, n_col)
    }

    fn grad_rows(&self, place: &Place, n_row: usize, n_col: usize) -> Rows<'_> {
        Rows::floats(self.grad(place), n_row, n_col)
    }

    pub(super) fn multiply(&self, stream: &Stream, a: Factor, b: Factor, groups: Groups, write: Write) -> Result<()> {
        if let Some(marks) = &self.marks {
            marks.count(a.n_operation(&b, groups));
        }
        let workspace = self.layout.workspace.all(&self.arena);
        self.operations.products.compute(stream, a, b, groups, write, Some(workspace))
    }

    fn rows(&self, span: MatrixSpan, n_row: usize) -> Rows<'_> {
        span.rows(&self.arena, n_row)
    }

    fn floats(&self, span: MatrixSpan, n_row: usize) -> View<'_, f32> {
        span.floats(&self.arena, n_row)
    }

    fn view<T: bytemuck::Pod>(&self, span: Span<T>, n: usize) -> View<'_, T> {
        span.view(&self.arena, n)
    }

    fn scratch(&self) -> View<'_, f32> {
        self.backward_memory().scratch.all(&self.arena)
    }

    fn backward_memory(&self) -> &Backward {
        self.layout.backward.as_ref().expect("planned for training")
    }

    /// Draws what is dropped at a site of `n` elements; nothing outside of training. Of two that are needed at once one is the `second`.
    fn draw(
        &self,
        stream: &Stream,
        pass: Pass,
        block: usize,
        site: Site,
        n: usize,
        second: bool,
    ) -> Result<Option<Dropped<'_>>> {
        let p = self.model.dropout;
        if !pass.trains || p == 0.0 {
            return Ok(None);
        }
        let bits = self.layout.bits[usize::from(second)].view(&self.arena, Dropped::n_word(n as u64));
        self.operations.dropout.draw(stream, self.numbers[0].view(), block, site as u32, p, bits, n as u64)?;
        Ok(Some(Dropped::new(bits, p)))
    }

    fn normalize(
        &self,
        stream: &Stream,
        x: View<f32>,
        n: usize,
        norm: &NormPlaces,
        at: Statistics,
        scores: Option<Scores>,
    ) -> Result<()> {
        self.mark(stream, Part::Norm)?;
        let affine = (self.param(&norm.scale), self.param(&norm.shift));
        let statistics = (self.view(at.mean, n), self.view(at.rstd, n));
        let y = self.rows(self.layout.normed, n);
        self.operations.norm.forward(stream, x, affine, self.model.norm_eps, y, statistics, scores)
    }

    fn normalize_backward(
        &self,
        stream: &Stream,
        x: View<f32>,
        n: usize,
        norm: &NormPlaces,
        at: Statistics,
    ) -> Result<()> {
        self.mark(stream, Part::Norm)?;
        let memory = self.backward_memory();
        let statistics = (self.view(at.mean, n), self.view(at.rstd, n));
        let gradients = (self.grad(&norm.scale), self.grad(&norm.shift));
        let (dy, dx) = (self.floats(memory.dnormed, n), self.floats(memory.dx, n));
        let scale = self.param(&norm.scale);
        self.operations.norm.backward(stream, dy, x, scale, statistics, dx, gradients, self.scratch())
    }

    pub(super) fn forward_and_backward(&self, stream: &Stream, pass: Pass) -> Result<()> {
        self.hidden(stream, pass)?;
        self.cross_entropy(stream, pass.n_token(), Some(self.numbers[0].view()))?;
        self.backward(stream, pass)
    }

    /// Where the input of block `index` is.
    fn x(&self, index: usize) -> MatrixSpan {
        self.layout.xs[index % self.layout.xs.len()]
    }

    /// The normalised rows that the head reads.
    pub(super) fn hidden(&self, stream: &Stream, pass: Pass) -> Result<()> {
        self.mark(stream, Part::Embedding)?;
        let (n, d) = (pass.n_token(), self.model.n_embd);
        let dropout = self.draw(stream, pass, 0, Site::Embedding, n * d, false)?;
        let ids = self.view(self.layout.input.ids, n);
        let (token, position) = (self.param(&self.model.token), self.param(&self.model.position));
        self.operations.embedding.forward(
            stream,
            ids,
            pass.n_col,
            token,
            position,
            dropout,
            self.floats(self.x(0), n),
        )?;
        for index in 0..self.model.blocks.len() {
            self.block(stream, pass, index, Some(self.x(index + 1)))?;
        }
        let last = self.x(self.model.blocks.len());
        self.normalize(stream, self.floats(last, n), n, &self.model.output_norm, self.layout.output_norm, None)
    }

    /// What a block's attention is given, with what it drops.
    fn attention_inputs<'a>(
        &'a self,
        stream: &Stream,
        pass: Pass,
        index: usize,
        qkv: Rows<'a>,
    ) -> Result<AttentionInputs<'a>> {
        let n = pass.n_token();
        let (input, p) = (&self.layout.input, self.model.dropout);
        let n_head = pass.n_row * self.model.n_head;
        let dropout = if pass.trains && p > 0.0 {
            let bits =
                self.view(self.layout.bits[0], Dropped::n_word((n_head * pass.n_col) as u64 * pass.n_col as u64));
            let (numbers, site) = (self.numbers[0].view(), Site::Attention as u32);
            self.operations.dropout.draw_causal(stream, numbers, index, site, p, bits, [n_head, pass.n_col])?;
            Some(Dropped::new(bits, p))
        } else {
            None
        };
        Ok(AttentionInputs {
            n_row: pass.n_row,
            n_col: pass.n_col,
            n_head: self.model.n_head,
            qkv,
            mask: pass.has_mask.then(|| self.view(input.mask, n)),
            first: pass.has_first.then(|| self.view(input.first, n)),
            dropout,
        })
    }

    /// A block: what is kept of it and, if anyone wants it, its output.
    fn block(&self, stream: &Stream, pass: Pass, index: usize, out: Option<MatrixSpan>) -> Result<()> {
        let Model { n_embd: d, .. } = self.model;
        let (n, block, kept) = (pass.n_token(), &self.model.blocks[index], &self.layout.kept[index]);
        let x = self.x(index);
        let normed = self.rows(self.layout.normed, n);

        self.normalize(stream, self.floats(x, n), n, &block.norm1, kept.norm1, None)?;
        self.mark(stream, Part::Projections)?;
        let qkv = self.rows(kept.qkv, n);
        let weight = Factor::transposed(self.weight(&block.qkv, 3 * d, d));
        let bias = block.qkv_bias.as_ref().map(|place| self.param(place));
        self.multiply(stream, normed.into(), weight, Groups::One, Write::Biased { out: qkv, bias, dropout: None })?;
        self.mark(stream, Part::Attention)?;
        let inputs = self.attention_inputs(stream, pass, index, qkv)?;
        let softmax = self.view(kept.softmax, inputs.softmax_len());
        let attended = self.rows(kept.attended, n);
        self.operations.attention.forward(stream, &inputs, attended, softmax)?;
        self.mark(stream, Part::Projections)?;
        let dropout = self.draw(stream, pass, index, Site::AttentionOut, n * d, false)?;
        let middle = self.rows(kept.middle, n);
        let bias = block.out_bias.as_ref().map(|place| self.param(place));
        let weight = Factor::transposed(self.weight(&block.out, d, d));
        let write = Write::Residual { out: middle, residual: self.rows(x, n), bias, dropout };
        self.multiply(stream, attended.into(), weight, Groups::One, write)?;
        self.feed_forward(stream, pass, index, out)
    }

    /// Its feed-forward half.
    fn feed_forward(&self, stream: &Stream, pass: Pass, index: usize, out: Option<MatrixSpan>) -> Result<()> {
        let Model { n_embd: d, n_ff, n_expert, .. } = self.model;
        let (n, block, kept) = (pass.n_token(), &self.model.blocks[index], &self.layout.kept[index]);
        let bias = |place: &Option<Place>| place.as_ref().map(|place| self.param(place));
        let middle = self.floats(kept.middle, n);
        let normed = self.rows(self.layout.normed, n);
        match (&block.ffn, &self.layout.kept_ffn[index]) {
            (FfnPlaces::Dense { up, up_bias, down, down_bias }, KeptFfn::Dense { pre }) => {
                self.normalize(stream, middle, n, &block.norm2, kept.norm2, None)?;
                self.mark(stream, Part::Dense)?;
                let (pre, hidden) = (self.rows(*pre, n), self.rows(self.layout.hidden, n));
                let activation = self.model.dense_activation;
                let write = Write::Activated { pre, hidden, bias: bias(up_bias), activation };
                let weight = Factor::transposed(self.weight(up, n_ff, d));
                self.multiply(stream, normed.into(), weight, Groups::One, write)?;
                let Some(out) = out else { return Ok(()) };
                let dropout = self.draw(stream, pass, index, Site::FfnOut, n * d, false)?;
                let (out, residual) = (self.rows(out, n), self.rows(kept.middle, n));
                let write = Write::Residual { out, residual, bias: bias(down_bias), dropout };
                let weight = Factor::transposed(self.weight(down, d, n_ff));
                self.multiply(stream, hidden.into(), weight, Groups::One, write)
            }
            (
                FfnPlaces::Experts { router, noise, selection_bias, up, up_bias, down, down_bias },
                KeptFfn::Experts(memory),
            ) => {
                let shape = routing_shape(&self.model, n);
                let n_choice = shape.n_choice();
                let noise = noise.as_ref().filter(|_| pass.has_noise).map(|place| self.param(place));
                let n_score = n_expert * (1 + usize::from(noise.is_some()));
                let scores = self.view(memory.scores, n * n_score);
                let scored = Scores { router: self.param(router), noise, out: scores };
                self.normalize(stream, middle, n, &block.norm2, kept.norm2, Some(scored))?;
                self.mark(stream, Part::Router)?;
                let (routed, queues) = (self.routed(memory, index, shape), self.queues(memory, index, shape));
                let normal = noise.map(|_| self.normal(pass, index));
                let scratch = self.layout.routing_scratch.all(&self.arena);
                self.operations.router.forward(
                    stream,
                    shape,
                    scores,
                    normal,
                    bias(selection_bias),
                    &routed,
                    scratch,
                )?;
                let capacity = pass.capacity.map(|capacity| capacity as u32);
                self.operations.dispatch.forward(stream, shape, routed.chosen, routed.loads, capacity, &queues)?;
                self.mark(stream, Part::Experts)?;
                let groups = Groups::Rows { starts: queues.starts, n: n_expert };
                let (pre, hidden) = (self.rows(memory.pre, n_choice), self.rows(self.layout.hidden, n_choice));
                let activation = self.model.expert_activation;
                let write = Write::Activated { pre, hidden, bias: bias(up_bias), activation };
                let gathered = Factor::new(normed).gathered(queues.token_of_kept);
                let weight = self.weight(up, n_expert * d, n_ff);
                self.multiply(stream, gathered, weight.into(), groups, write)?;
                let dropout = self.draw(stream, pass, index, Site::Expert, n_choice * d, false)?;
                let y = self.rows(memory.y, n_choice);
                let write = Write::Biased { out: y, bias: bias(down_bias), dropout };
                let weight = self.weight(down, n_expert * n_ff, d);
                self.multiply(stream, hidden.into(), weight.into(), groups, write)?;
                let Some(out) = out else { return Ok(()) };
                let dropout = self.draw(stream, pass, index, Site::FfnOut, n * d, false)?;
                let out = self.floats(out, n);
                self.operations.experts.combine(stream, shape, y, routed.weights, queues.position, middle, dropout, out)
            }
            _ => unreachable!("what is kept of a block is of its own kind"),
        }
    }

    /// Which of the MoE blocks block `index` is.
    fn moe_number(&self, index: usize) -> usize {
        self.model.blocks[..index].iter().filter(|block| block.is_moe()).count()
    }

    fn normal(&self, pass: Pass, index: usize) -> View<'_, f32> {
        let n = pass.n_token() * self.model.n_expert;
        let begin = self.moe_number(index) * n;
        self.view(self.layout.input.normal, begin + n).part(begin..begin + n)
    }

    fn routed<'a>(&'a self, memory: &Experts, index: usize, shape: RoutingShape) -> Routed<'a> {
        let (moe, n_expert) = (self.moe_number(index), shape.n_expert);
        let statistics = 1 + moe * (2 + n_expert);
        Routed {
            logits: self.view(memory.logits, shape.n_token * n_expert),
            chosen: self.view(memory.chosen, shape.n_choice()),
            weights: self.view(memory.weights, shape.n_choice()),
            statistics: self.layout.sums.all(&self.arena).part(statistics..statistics + 2 + n_expert),
            loads: self.layout.counts.all(&self.arena).part(moe * n_expert..(moe + 1) * n_expert),
        }
    }

    fn queues<'a>(&'a self, memory: &Experts, index: usize, shape: RoutingShape) -> Queues<'a> {
        let n_dropped = self.model.n_moe() * shape.n_expert + self.moe_number(index);
        Queues {
            kept: self.view(memory.kept, shape.n_choice()),
            starts: self.view(memory.starts, shape.n_expert + 1),
            token_of_kept: self.view(memory.token_of_kept, shape.n_choice()),
            position: self.view(memory.position, shape.n_choice()),
            n_dropped: self.layout.counts.all(&self.arena).part(n_dropped..n_dropped + 1),
        }
    }

    /// The head and the loss over chunks of rows, whose logits alone exist; with `numbers` the gradients of the normalised rows, and of the
    /// head's weight.
    pub(super) fn cross_entropy(&self, stream: &Stream, n: usize, numbers: Option<View<Numbers>>) -> Result<()> {
        self.mark(stream, Part::Head)?;
        let Model { n_vocab, n_embd: d, token, .. } = &self.model;
        let head = self.weight(token, *n_vocab, *d);
        let (targets, losses) = (self.view(self.layout.input.targets, n), self.view(self.layout.losses, n));
        for begin in (0..n).step_by(self.layout.n_logit_row) {
            let range = begin..n.min(begin + self.layout.n_logit_row);
            let normed = self.rows(self.layout.normed, n).rows(range.clone());
            let logits = self.rows(self.layout.logits, range.len());
            self.multiply(stream, normed.into(), Factor::transposed(head), Groups::One, Write::Replace(logits))?;
            let (targets, losses) = (targets.part(range.clone()), losses.part(range.clone()));
            let gradients = numbers.map(|numbers| (self.rows(self.backward_memory().dlogits, range.len()), numbers));
            self.operations.cross_entropy.run(stream, logits, targets, losses, gradients)?;
            if let Some((dlogits, _)) = gradients {
                let dnormed = self.rows(self.backward_memory().dnormed, n).rows(range);
                self.multiply(stream, dlogits.into(), head.into(), Groups::One, Write::Replace(dnormed))?;
                let write = Write::Add(self.grad_rows(token, *n_vocab, *d));
                self.multiply(stream, Factor::transposed(dlogits), normed.into(), Groups::One, write)?;
            }
        }
        self.operations.cross_entropy.add_up(stream, losses, self.layout.sums.view(&self.arena, 1))
    }

    /// From the gradients of the normalised rows to those of all parameters.
    fn backward(&self, stream: &Stream, pass: Pass) -> Result<()> {
        let (n, d, n_block) = (pass.n_token(), self.model.n_embd, self.model.blocks.len());
        let memory = self.backward_memory();
        let dx = self.floats(memory.dx, n);
        stream.zero(dx)?;
        let last = self.floats(self.x(n_block), n);
        self.normalize_backward(stream, last, n, &self.model.output_norm, self.layout.output_norm)?;
        for index in (0..n_block).rev() {
            match self.plan.recompute {
                Recompute::Nothing => {}
                Recompute::FeedForward => self.feed_forward(stream, pass, index, None)?,
                Recompute::Blocks => self.block(stream, pass, index, None)?,
            }
            self.feed_forward_backward(stream, pass, index)?;
            self.attention_backward(stream, pass, index)?;
        }
        self.mark(stream, Part::Embedding)?;
        let dropout = self.draw(stream, pass, 0, Site::Embedding, n * d, false)?;
        let (ids, order) = (self.view(self.layout.input.ids, n), self.view(self.layout.input.order, n));
        let (token, position) = (self.grad(&self.model.token), self.grad(&self.model.position));
        let n_col = pass.n_col;
        self.operations.embedding.backward(stream, dx, dropout, ids, order, n_col, token, position, self.scratch())?;
        let counts = self.layout.counts.all(&self.arena);
        self.operations.convert.add_counts(stream, self.layout.step_counts.all(&self.arena), counts)?;
        self.mark(stream, Part::Other)
    }

    /// Adds the sums of `dy`'s columns, over each group of rows if there are any, to the gradient of a bias.
    fn bias_backward(&self, stream: &Stream, dy: Rows, starts: Option<View<u32>>, bias: &Option<Place>) -> Result<()> {
        let Some(place) = bias else { return Ok(()) };
        self.operations.column_sums.add(stream, dy, starts, self.grad(place), self.scratch())
    }

    fn feed_forward_backward(&self, stream: &Stream, pass: Pass, index: usize) -> Result<()> {
        let Model { n_embd: d, n_ff, n_expert, .. } = self.model;
        let (n, block, kept) = (pass.n_token(), &self.model.blocks[index], &self.layout.kept[index]);
        let memory = self.backward_memory();
        let middle = self.floats(kept.middle, n);
        let normed = self.rows(self.layout.normed, n);
        let dx = self.floats(memory.dx, n);
        let dnormed = self.rows(memory.dnormed, n);
        // The normalised rows were not kept: one more pass over them costs less than their memory.
        self.normalize(stream, middle, n, &block.norm2, kept.norm2, None)?;
        match (&block.ffn, &self.layout.kept_ffn[index]) {
            (FfnPlaces::Dense { up, up_bias, down, down_bias }, KeptFfn::Dense { pre }) => {
                self.mark(stream, Part::Dense)?;
                let dropout = self.draw(stream, pass, index, Site::FfnOut, n * d, false)?;
                let dy = self.rows(memory.dy, n);
                self.operations.convert.rows(stream, self.rows(memory.dx, n), dy, dropout)?;
                let (pre, dpre, hidden) =
                    (self.rows(*pre, n), self.rows(memory.dpre, n), self.rows(self.layout.hidden, n));
                let activation = self.model.dense_activation;
                let write = Write::ActivationBackward { pre, dpre, hidden, activation };
                self.multiply(stream, dy.into(), self.weight(down, d, n_ff).into(), Groups::One, write)?;
                let write = Write::Add(self.grad_rows(down, d, n_ff));
                self.multiply(stream, Factor::transposed(dy), hidden.into(), Groups::One, write)?;
                self.bias_backward(stream, dy, None, down_bias)?;
                let weight = self.weight(up, n_ff, d);
                self.multiply(stream, dpre.into(), weight.into(), Groups::One, Write::Replace(dnormed))?;
                let write = Write::Add(self.grad_rows(up, n_ff, d));
                self.multiply(stream, Factor::transposed(dpre), normed.into(), Groups::One, write)?;
                self.bias_backward(stream, dpre, None, up_bias)?;
            }
            (FfnPlaces::Experts { router, noise, up, up_bias, down, down_bias, .. }, KeptFfn::Experts(experts)) => {
                self.mark(stream, Part::Experts)?;
                let shape = routing_shape(&self.model, n);
                let n_choice = shape.n_choice();
                let (routed, queues) = (self.routed(experts, index, shape), self.queues(experts, index, shape));
                let starts = queues.starts;
                let of_block = self.draw(stream, pass, index, Site::FfnOut, n * d, true)?;
                let of_experts = self.draw(stream, pass, index, Site::Expert, n_choice * d, false)?;
                // What was the output becomes its gradient.
                let dy = self.rows(experts.y, n_choice);
                let dweights = self.view(memory.dweights, n_choice);
                self.operations.experts.combine_backward(
                    stream,
                    shape,
                    dx,
                    of_block,
                    dy,
                    routed.weights,
                    queues.position,
                    of_experts,
                    dy,
                    dweights,
                )?;
                let rows = Groups::Rows { starts, n: n_expert };
                let sums = Groups::Sums { starts, n: n_expert };
                let pre = self.rows(experts.pre, n_choice);
                let (dpre, hidden) = (self.rows(memory.dpre, n_choice), self.rows(self.layout.hidden, n_choice));
                let activation = self.model.expert_activation;
                let write = Write::ActivationBackward { pre, dpre, hidden, activation };
                let weight = Factor::transposed(self.weight(down, n_expert * n_ff, d));
                self.multiply(stream, dy.into(), weight, rows, write)?;
                let write = Write::Add(self.grad_rows(down, n_expert * n_ff, d));
                self.multiply(stream, Factor::transposed(hidden), dy.into(), sums, write)?;
                self.bias_backward(stream, dy, Some(starts), down_bias)?;
                let gathered = Factor::transposed(normed).gathered(queues.token_of_kept);
                let write = Write::Add(self.grad_rows(up, n_expert * d, n_ff));
                self.multiply(stream, gathered, dpre.into(), sums, write)?;
                self.bias_backward(stream, dpre, Some(starts), up_bias)?;
                let dinput = self.rows(memory.dinput, n_choice);
                let weight = Factor::transposed(self.weight(up, n_expert * d, n_ff));
                self.multiply(stream, dpre.into(), weight, rows, Write::Replace(dinput))?;

                self.mark(stream, Part::Router)?;
                let noise = noise.as_ref().filter(|_| pass.has_noise);
                let n_score = n_expert * (1 + usize::from(noise.is_some()));
                let scores = self.view(experts.scores, n * n_score);
                let noise_of = noise.map(|_| Noise { scores, normal: self.normal(pass, index) });
                let (aux, z) = self.model.router_loss_weights;
                let losses = RouterLosses { aux, z };
                let dscores = self.view(memory.dscores, n * n_score);
                let numbers = self.numbers[0].view();
                let router_of = &self.operations.router;
                router_of.backward(stream, shape, dweights, &routed, noise_of, losses, numbers, dscores)?;
                let scorer = Scorer { weight: self.param(router), noise: noise.map(|place| self.param(place)) };
                let dscorer = Scorer { weight: self.grad(router), noise: noise.map(|place| self.grad(place)) };
                let handed_back = Some(Gathered { dinput, position: queues.position });
                let dnormed = self.floats(memory.dnormed, n);
                let scratch = self.scratch();
                router_of.scores_backward(
                    stream,
                    shape,
                    dscores,
                    scorer,
                    normed,
                    handed_back,
                    dnormed,
                    dscorer,
                    scratch,
                )?;
            }
            _ => unreachable!("what is kept of a block is of its own kind"),
        }
        self.normalize_backward(stream, middle, n, &block.norm2, kept.norm2)
    }

    fn attention_backward(&self, stream: &Stream, pass: Pass, index: usize) -> Result<()> {
        let d = self.model.n_embd;
        let (n, block, kept) = (pass.n_token(), &self.model.blocks[index], &self.layout.kept[index]);
        let memory = self.backward_memory();
        self.mark(stream, Part::Projections)?;
        let dropout = self.draw(stream, pass, index, Site::AttentionOut, n * d, false)?;
        let (dy, attended) = (self.rows(memory.dy, n), self.rows(kept.attended, n));
        self.operations.convert.rows(stream, self.rows(memory.dx, n), dy, dropout)?;
        let dattended = self.rows(memory.dattended, n);
        let weight = self.weight(&block.out, d, d);
        self.multiply(stream, dy.into(), weight.into(), Groups::One, Write::Replace(dattended))?;
        let write = Write::Add(self.grad_rows(&block.out, d, d));
        self.multiply(stream, Factor::transposed(dy), attended.into(), Groups::One, write)?;
        self.bias_backward(stream, dy, None, &block.out_bias)?;
        self.mark(stream, Part::Attention)?;
        let inputs = self.attention_inputs(stream, pass, index, self.rows(kept.qkv, n))?;
        let (softmax, delta) =
            (self.view(kept.softmax, inputs.softmax_len()), self.view(memory.delta, inputs.delta_len()));
        let dqkv = self.rows(memory.dqkv, n);
        self.operations.attention.backward(stream, &inputs, attended, dattended, softmax, delta, dqkv)?;
        let x = self.floats(self.x(index), n);
        self.normalize(stream, x, n, &block.norm1, kept.norm1, None)?;
        self.mark(stream, Part::Projections)?;
        let (weight, dnormed) = (self.weight(&block.qkv, 3 * d, d), self.rows(memory.dnormed, n));
        self.multiply(stream, dqkv.into(), weight.into(), Groups::One, Write::Replace(dnormed))?;
        let write = Write::Add(self.grad_rows(&block.qkv, 3 * d, d));
        let normed = self.rows(self.layout.normed, n);
        self.multiply(stream, Factor::transposed(dqkv), normed.into(), Groups::One, write)?;
        self.bias_backward(stream, dqkv, None, &block.qkv_bias)?;
        self.normalize_backward(stream, x, n, &block.norm1, kept.norm1)
    }
}
