//! Where each tensor of the table stands in the GPU's one vector of parameters, and which stretches of it each optimizer moves.

use std::ops::Range;

use param_cuda::training::{
    ALIGNMENT, BlockPlaces, FfnPlaces, Model, MuonMatrix, MuonStack, NormPlaces, Place, Stretch,
};
use param_model::{Config, Part, TensorSpec};

use crate::cpu::router_loss_weights;
use crate::optimizer::Group;
use crate::settings::Settings;

/// A model's tensors on the GPU.
pub struct Places {
    /// Of each tensor, in the table's order.
    pub tensors: Vec<Place>,
    /// The model.
    pub model: Model,
    /// Elements, all at the beginning, that Muon moves. Their running sums stand at the same elements; AdamW's moments of what follows
    /// from 0 on.
    pub n_muon: usize,
}

/// Tensors stand in this order: those that Muon moves first.
fn order(part: Part) -> usize {
    match part {
        Part::AttnQ | Part::AttnK | Part::AttnV | Part::AttnOut => 0,
        Part::FfnUp | Part::FfnDown | Part::ExpertUp | Part::ExpertDown => 1,
        Part::AttnQBias | Part::AttnKBias | Part::AttnVBias => 2,
        _ => 3,
    }
}

/// Whether kernels read it as one matrix with what stands before it.
fn continues(part: Part) -> bool {
    matches!(part, Part::AttnK | Part::AttnV | Part::AttnKBias | Part::AttnVBias)
}

impl Places {
    /// Those of `config`'s tensors `table`, whose groups are `groups`.
    pub fn new(config: &Config, table: &[TensorSpec], groups: &[Group]) -> Self {
        let mut sorted = (0..table.len()).collect::<Vec<_>>();
        // Stable: parts of a block stay in the table's order.
        sorted.sort_by_key(|&i| (order(table[i].part), table[i].block));
        let (mut at, mut n_muon) = (0usize, 0);
        let mut tensors = vec![0..0; table.len()];
        for i in sorted {
            if !continues(table[i].part) {
                at = at.next_multiple_of(ALIGNMENT);
            }
            tensors[i] = at..at + table[i].n_elements();
            at = tensors[i].end;
            if groups[i].is_muons {
                n_muon = at;
            }
        }
        let n_muon = n_muon.next_multiple_of(ALIGNMENT);
        let model = model(config, table, &tensors, at.next_multiple_of(ALIGNMENT));
        Self { tensors, model, n_muon }
    }

    /// One vector of tensors in the table's order; what lies between them is zero.
    pub fn joined(&self, tensors: &[Vec<f32>], range: Range<usize>) -> Vec<f32> {
        let mut flat = vec![0.0; range.len()];
        for (place, tensor) in self.tensors.iter().zip(tensors).filter(|(place, _)| inside(place, &range)) {
            flat[place.start - range.start..place.end - range.start].copy_from_slice(tensor);
        }
        flat
    }

    /// What of `flat`, which stands at `range` of the vector, belongs to each tensor; nothing of those that stand elsewhere.
    pub fn split(&self, flat: &[f32], range: Range<usize>) -> Vec<Vec<f32>> {
        let part = |place: &Place| match inside(place, &range) {
            true => flat[place.start - range.start..place.end - range.start].to_vec(),
            false => Vec::new(),
        };
        self.tensors.iter().map(part).collect()
    }

    /// What AdamW moves.
    pub fn stretches(&self, table: &[TensorSpec], groups: &[Group], settings: &Settings) -> Vec<Stretch> {
        let tensors = self.tensors.iter().zip(table).zip(groups);
        let adamws = tensors.filter(|((_, spec), group)| !group.is_muons && !group.is_frozen && spec.has_gradient());
        let stretch = |((place, _), group): ((&Place, &TensorSpec), &Group)| Stretch {
            begin: place.start,
            moment: place.start - self.n_muon,
            len: place.len(),
            lr_scale: group.lr_scale,
            decay: if group.decays { settings.adamw.weight_decay } else { 0.0 },
        };
        adamws.map(stretch).collect()
    }

    /// The matrices that Muon moves, by shape.
    pub fn stacks(&self, table: &[TensorSpec], groups: &[Group], settings: &Settings) -> Vec<MuonStack> {
        let mut stacks: Vec<MuonStack> = Vec::new();
        for i in (0..table.len()).filter(|&i| groups[i].is_muons && !groups[i].is_frozen) {
            let &[.., n_row, n_col] = &table[i].shape[..] else { unreachable!("Muon's tensors are matrices") };
            let (group, shape) = (groups[i], (n_row, n_col));
            let matrix = |begin: usize| MuonMatrix {
                begin: begin as u64,
                moment: begin as u64,
                lr_scale: group.lr_scale,
                decay: if group.decays { settings.adamw.weight_decay } else { 0.0 },
            };
            let matrices = self.tensors[i].clone().step_by(n_row * n_col).map(matrix);
            match stacks.iter_mut().find(|stack| stack.shape == shape) {
                Some(stack) => stack.matrices.extend(matrices),
                None => stacks.push(MuonStack { shape, matrices: matrices.collect() }),
            }
        }
        stacks
    }

    /// What is not trained, whose gradients do not count.
    pub fn frozen(&self, groups: &[Group]) -> Vec<Place> {
        self.tensors.iter().zip(groups).filter(|(_, group)| group.is_frozen).map(|(place, _)| place.clone()).collect()
    }
}

fn inside(place: &Place, range: &Range<usize>) -> bool {
    range.start <= place.start && place.end <= range.end
}

fn model(config: &Config, table: &[TensorSpec], tensors: &[Place], n_param: usize) -> Model {
    let find = |part: Part, block: Option<usize>| {
        table.iter().position(|spec| (spec.part, spec.block) == (part, block)).map(|i| tensors[i].clone())
    };
    let at = |part: Part, block: Option<usize>| find(part, block).expect("a tensor of every model");
    let norm = |scale: Part, shift: Part, block: Option<usize>| NormPlaces {
        scale: at(scale, block),
        shift: at(shift, block),
    };
    let block = |i: usize| {
        let block = Some(i);
        let ffn = if config.is_moe(i) {
            FfnPlaces::Experts {
                router: at(Part::Router, block),
                noise: find(Part::RouterNoise, block),
                selection_bias: find(Part::SelectionBias, block),
                up: at(Part::ExpertUp, block),
                up_bias: find(Part::ExpertUpBias, block),
                down: at(Part::ExpertDown, block),
                down_bias: find(Part::ExpertDownBias, block),
            }
        } else {
            FfnPlaces::Dense {
                up: at(Part::FfnUp, block),
                up_bias: find(Part::FfnUpBias, block),
                down: at(Part::FfnDown, block),
                down_bias: find(Part::FfnDownBias, block),
            }
        };
        BlockPlaces {
            norm1: norm(Part::AttnNormScale, Part::AttnNormShift, block),
            qkv: at(Part::AttnQ, block).start..at(Part::AttnV, block).end,
            qkv_bias: find(Part::AttnQBias, block).zip(find(Part::AttnVBias, block)).map(|(q, v)| q.start..v.end),
            out: at(Part::AttnOut, block),
            out_bias: find(Part::AttnOutBias, block),
            norm2: norm(Part::FfnNormScale, Part::FfnNormShift, block),
            ffn,
        }
    };
    let activation = |of: param_model::Activation| match of {
        param_model::Activation::GeluErf => param_cuda::model::Activation::GeluErf,
        param_model::Activation::GeluTanh => param_cuda::model::Activation::GeluTanh,
    };
    let has_experts = config.moe_blocks().next().is_some();
    let of_experts = |n: usize| if has_experts { n } else { 0 };
    Model {
        n_vocab: config.n_vocab,
        n_ctx: config.n_ctx,
        n_embd: config.n_embd,
        n_head: config.n_head,
        n_ff: config.n_ff(),
        n_expert: of_experts(config.n_expert),
        n_used: of_experts(config.n_expert_used),
        expert_activation: activation(config.expert_activation),
        dense_activation: activation(config.dense_activation),
        norm_eps: config.norm_eps,
        dropout: config.dropout,
        router_loss_weights: router_loss_weights(config),
        token: at(Part::TokenEmbd, None),
        position: at(Part::PositionEmbd, None),
        output_norm: norm(Part::OutputNormScale, Part::OutputNormShift, None),
        blocks: (0..config.n_layer).map(block).collect(),
        n_param,
    }
}

#[cfg(test)]
mod tests {
    use param_model::tensors;

    use super::*;
    use crate::init::initialise;
    use crate::recipe::Recipe;

    fn config() -> Config {
        Config { qkv_bias: true, n_embd: 24, n_head: 3, n_expert: 3, ..Config::preset("param-tiny").unwrap() }
    }

    #[test]
    fn no_two_tensors_share_an_element_and_all_come_back() {
        let (config, table) = (config(), tensors(&config()));
        for recipe in [Recipe::Recommended, Recipe::AdamW] {
            let groups = Group::all(&table, &recipe.settings(&config, 10)).unwrap();
            let places = Places::new(&config, &table, &groups);
            let mut sorted = places.tensors.clone();
            sorted.sort_by_key(|place| place.start);
            assert!(sorted.windows(2).all(|two| two[0].end <= two[1].start));
            for (place, (spec, group)) in places.tensors.iter().zip(table.iter().zip(&groups)) {
                assert_eq!(place.len(), spec.n_elements());
                assert_eq!(place.end <= places.n_muon, group.is_muons, "{}", spec.checkpoint);
                assert!(continues(spec.part) || place.start.is_multiple_of(ALIGNMENT), "{}", spec.checkpoint);
            }
            let (params, all) = (initialise(&config, 5), 0..places.model.n_param);
            assert_eq!(places.split(&places.joined(&params, all.clone()), all), params);
        }
    }

    #[test]
    fn stretches_and_stacks_cover_what_is_trained_once() {
        let (config, table) = (config(), tensors(&config()));
        let base = Recipe::Recommended.settings(&config, 10);
        let settings = Settings { freeze: vec!["position_emb".to_owned(), "moe.experts.c_fc$".to_owned()], ..base };
        let groups = Group::all(&table, &settings).unwrap();
        let places = Places::new(&config, &table, &groups);
        let mut times = vec![0; places.model.n_param];
        for stretch in places.stretches(&table, &groups, &settings) {
            times[stretch.begin..stretch.begin + stretch.len].iter_mut().for_each(|n| *n += 1);
        }
        let stacks = places.stacks(&table, &groups, &settings);
        for MuonStack { shape: (n_row, n_col), matrices } in &stacks {
            for MuonMatrix { begin, .. } in matrices {
                times[*begin as usize..*begin as usize + n_row * n_col].iter_mut().for_each(|n| *n += 1);
            }
        }
        for ((place, spec), group) in places.tensors.iter().zip(&table).zip(&groups) {
            let expected = usize::from(!group.is_frozen && spec.has_gradient());
            assert!(times[place.clone()].iter().all(|&n| n == expected), "{}", spec.checkpoint);
        }
        // Queries, keys, values and outputs of all blocks; up of the dense ones; down of those, and of the experts, which lie the other
        // way round.
        let shapes = stacks.iter().map(|stack| (stack.shape, stack.matrices.len())).collect::<Vec<_>>();
        assert_eq!(shapes, [((24, 24), 4 * 4), ((96, 24), 2 * 3 + 2), ((24, 96), 2)]);
    }
}
