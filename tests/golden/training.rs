//! The trainer against the reference: losses and their parts, routing, every gradient, three AdamW steps.

use std::collections::BTreeMap;

use param_model::{Checkpoint, Part};
use param_train::cpu::{Capacity, Compute, GradientScale, Losses, Mode, Model, NoiseSource, Sequences};
use param_train::cuda::CudaLearner;
use param_train::data::{Batch, IGNORED, Layout};
use param_train::optimizer::{self, AdamW, Decay, Group, Moments, Step, clip_factor, global_norm};
use param_train::recipe::Recipe;
use param_train::settings::{Dtype, Settings};
use serde_json::Value;

use super::{Array, Case, assert_close, cases};

/// A training variant of a case: its batch and how the reference treated it.
struct Variant {
    name: String,
    expected: Value,
    arrays: BTreeMap<String, Array>,
    noise: Vec<Vec<f32>>,
    capacity: Capacity,
}

impl Variant {
    /// The variants whose files a case has.
    fn all(case: &Case) -> Vec<Self> {
        let train = case.json("train.json");
        let variants = train.as_object().unwrap().iter().filter(|(_, v)| v.get("steps").is_some());
        let variants = variants.map(|(name, expected)| {
            let arrays = case.arrays(&format!("train_{name}_io.npz"));
            let noise = (0..case.config.n_layer).filter_map(|i| arrays.get(&format!("noise{i}")));
            let noise = noise.map(|a| a.floats.clone()).collect();
            let capacity = if name.starts_with("cap") {
                Capacity::Factor { factor: case.config.train_capacity, min: case.config.min_capacity }
            } else {
                Capacity::Unlimited
            };
            Self { name: name.clone(), expected: expected.clone(), arrays, noise, capacity }
        });
        let variants = variants.collect::<Vec<_>>();
        assert!(!variants.is_empty(), "{}: no training variant", case.name());
        variants
    }

    fn mode(&self) -> Mode<'_> {
        let noise = if self.noise.is_empty() { NoiseSource::Off } else { NoiseSource::Given(&self.noise) };
        Mode { dropout: None, capacity: self.capacity, noise }
    }

    fn ids(&self) -> Vec<u32> {
        self.arrays["input_ids"].ints.iter().map(|&id| id as u32).collect()
    }

    fn mask(&self) -> Option<Vec<bool>> {
        self.arrays.get("attention_mask").map(|m| m.ints.iter().map(|&v| v != 0).collect())
    }

    fn n_col(&self) -> usize {
        self.arrays["input_ids"].shape[1]
    }

    /// The reference predicts label `t + 1` from position `t`; its last position predicts nothing.
    fn targets(&self) -> Vec<i32> {
        let rows = self.arrays["labels"].ints.chunks_exact(self.n_col());
        rows.flat_map(|row| row[1..].iter().copied().chain([IGNORED])).collect()
    }
}

struct Run {
    model: Model,
    params: Vec<Vec<f32>>,
    grads: Vec<Vec<f32>>,
}

impl Run {
    fn new(case: &Case) -> Self {
        let model = Model::new(&case.config, Compute::default());
        let grads = model.zeros();
        Self { model, params: case.params(), grads }
    }

    fn gradients(&mut self, variant: &Variant) -> Losses {
        self.grads.iter_mut().for_each(|g| g.fill(0.0));
        let (ids, mask, targets) = (variant.ids(), variant.mask(), variant.targets());
        let sequences = Sequences { ids: &ids, n_col: variant.n_col(), mask: mask.as_deref(), first: None };
        let n_target = targets.iter().filter(|&&t| t != IGNORED).count();
        let scale = GradientScale { n_target, n_batch: 1 };
        self.model.loss_and_gradients(&self.params, &mut self.grads, sequences, &targets, variant.mode(), scale)
    }
}

fn for_each_variant(check: impl Fn(&Case, &Variant, &str)) {
    for case in cases() {
        for variant in Variant::all(&case) {
            check(&case, &variant, &format!("{}/{}", case.name(), variant.name));
        }
    }
}

fn assert_relative(what: &str, got: f64, want: &Value, bound: f64) {
    let want = want.as_f64().unwrap();
    assert!((got - want).abs() <= bound * want.abs(), "{what}: {got}, expected {want}");
}

#[test]
fn losses_and_routing_equal_the_reference_at_every_step() {
    for_each_variant(|case, variant, at| {
        let optimizer = &case.json("train.json")["optimizer"];
        let mut run = Run::new(case);
        let mut moments = Moments { first: run.model.zeros(), second: run.model.zeros() };
        for (step, expected) in variant.expected["steps"].as_array().unwrap().iter().enumerate() {
            let at = format!("{at} step {}", step + 1);
            let losses = run.gradients(variant);
            assert_relative(&format!("{at} ce"), losses.ce(), &expected["ce"], 1e-5);
            assert_relative(&format!("{at} aux"), losses.aux(), &expected["aux"], 1e-5);
            assert_relative(&format!("{at} z"), losses.z(), &expected["z"], 1e-5);
            assert_relative(&format!("{at} total"), losses.total(&case.config), &expected["total"], 1e-5);
            for (i, routing) in losses.routings.iter().enumerate() {
                assert_relative(&format!("{at} aux {i}"), routing.aux, &expected["aux_per_layer"][i], 1e-5);
                assert_relative(&format!("{at} z {i}"), routing.z, &expected["z_per_layer"][i], 1e-5);
                assert_eq!(routing.n_dropped() as u64, expected["dropped"][i].as_u64().unwrap(), "{at} dropped {i}");
                let used = (0..case.config.n_expert).map(|e| routing.of_expert(e).len()).collect::<Vec<_>>();
                assert_eq!(Value::from(used), expected["used"][i], "{at} used {i}");
            }
            let norm = global_norm(run.model.table_and_team().1, &run.grads);
            assert_relative(&format!("{at} gradient norm"), norm, &expected["grad_norm"], 1e-5);
            step_by(optimizer, &mut run, &mut moments, norm, step as u64 + 1);
        }
    });
}

fn step_by(optimizer: &Value, run: &mut Run, moments: &mut Moments, norm: f64, t: u64) {
    let number = |v: &Value| v.as_f64().unwrap() as f32;
    let adamw = AdamW {
        beta1: number(&optimizer["betas"][0]),
        beta2: number(&optimizer["betas"][1]),
        eps: number(&optimizer["eps"]),
        weight_decay: number(&optimizer["weight_decay"]),
        decay: Decay::All,
    };
    let settings = Settings { adamw, ..Recipe::Reference.settings(run.model.config(), 3) };
    let (table, team) = run.model.table_and_team();
    let groups = Group::all(table, &settings).unwrap();
    let grad_scale = clip_factor(norm, number(&optimizer["clip_grad_norm"]));
    let at = Step { number: t, lr: number(&optimizer["lr"]), muon_lr: 0.0, grad_scale };
    let (params, grads) = (&mut run.params, &mut run.grads);
    optimizer::step(team, &mut Vec::new(), (table, &groups), params, grads, moments, &settings, at);
}

#[test]
fn first_step_logits_and_chosen_experts_equal_the_reference() {
    for_each_variant(|case, variant, at| {
        let mut run = Run::new(case);
        let (ids, mask) = (variant.ids(), variant.mask());
        let sequences = Sequences { ids: &ids, n_col: variant.n_col(), mask: mask.as_deref(), first: None };
        let positions = (0..ids.len()).collect::<Vec<_>>();
        let logits = run.model.logits(&run.params, sequences, &positions, variant.mode());
        assert_close(&format!("{at} logits"), &logits, &variant.arrays["logits"].floats, 1e-4);
        let losses = run.model.loss(&run.params, sequences, &variant.targets(), variant.mode());
        let moe = (0..case.config.n_layer).filter(|&i| case.config.is_moe(i));
        for (routing, layer) in losses.routings.iter().zip(moe) {
            let array = |name: &str| &variant.arrays[&format!("router{layer}.{name}")];
            let chosen = routing.chosen.iter().map(|&e| e as i32).collect::<Vec<_>>();
            assert_eq!(chosen, array("experts").ints, "{at} experts of block {layer}");
            assert_close(&format!("{at} router {layer}"), &routing.logits, &array("logits").floats, 1e-4);
            assert_close(&format!("{at} weights {layer}"), &routing.weights, &array("weights").floats, 1e-5);
        }
    });
}

/// Losses, routing and gradients on the emulated GPU, or with `PARAM_GPU=1` on a real one.
///
/// Bounds: 1e-3 of each gradient's norm in f32; in bf16 3e-2 of the norm of all together, and a fifth where rounding sent some of the few
/// tokens to other experts, or dropped others, as the experts' loads show.
#[test]
fn gradients_on_a_gpu_equal_the_reference() {
    param_cuda_emulation::preload();
    let gpu = param_cuda::open().unwrap();
    for_each_variant(|case, variant, at| {
        let golden = Checkpoint::open(&case.folder.join(format!("train_{}.safetensors", variant.name))).unwrap();
        let (ids, n_col) = (variant.ids(), variant.n_col());
        let mask = variant.mask();
        let layout = if mask.is_some() { Layout::OneDocumentPerRow } else { Layout::Packed };
        let n_row = ids.len() / n_col;
        let batch = Batch { n_row, input: ids, target: variant.targets(), mask, first: None, n_bytes: 0 };
        let mut loads = None;
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let base = Recipe::Reference.settings(&case.config, 3);
            let settings = Settings { batch_size: n_row, context: n_col, layout, dtype, ..base };
            let table = param_model::tensors(&case.config);
            let groups = Group::all(&table, &settings).unwrap();
            let moments = Moments::zeros(&table, &groups);
            let mut learner =
                CudaLearner::new(&gpu, &case.config, &settings, &case.params(), groups, &moments).unwrap();
            let normal = Some(variant.noise.concat()).filter(|normal| !normal.is_empty());
            let (losses, grads) = learner.loss_and_gradients(&batch, variant.capacity, normal.as_deref()).unwrap();
            let expected = &variant.expected["steps"][0];
            let (near, ce) = (if dtype == Dtype::F32 { 1e-5 } else { 5e-3 }, losses.cross_entropy);
            assert_relative(&format!("{at} {dtype:?} ce"), ce.sum / ce.n_target as f64, &expected["ce"], near);
            let (mut all_off, mut all_size) = (0.0, 0.0);
            for_each_tensor(case, variant, |i, name, entry| {
                let want = golden.tensor(&format!("grad.{name}")).unwrap().expect(name).to_f32();
                let stride = entry["grad"]["stride"].as_u64().unwrap() as usize;
                let (off, size) = distance(&grads[i], &want, stride, |j| f64::from(want[j]));
                (all_off, all_size) = (all_off + off * off, all_size + size * size);
                let off_by = format!("{at} gradient of {name}: off by {off} of {size}");
                assert!(dtype != Dtype::F32 || off <= 1e-3 * size, "{off_by}");
            });
            let (off, size) = (f64::sqrt(all_off), f64::sqrt(all_size));
            let routed =
                losses.routers.iter().map(|router| (router.load.clone(), router.n_dropped)).collect::<Vec<_>>();
            let bound = if *loads.get_or_insert_with(|| routed.clone()) == routed { 3e-2 } else { 0.2 };
            assert!(off <= bound * size, "{at} {dtype:?}: all gradients off by {off} of {size}, allowed {bound}");
            if dtype == Dtype::F32 {
                for (i, router) in losses.routers.iter().enumerate() {
                    assert_relative(&format!("{at} aux {i}"), router.aux, &expected["aux_per_layer"][i], 1e-5);
                    assert_relative(&format!("{at} z {i}"), router.z, &expected["z_per_layer"][i], 1e-5);
                    assert_eq!(router.n_dropped as u64, expected["dropped"][i].as_u64().unwrap(), "{at} dropped {i}");
                }
            }
        }
    });
}

fn l2(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|v| v * v).sum::<f64>().sqrt()
}

/// Relative distance to a golden tensor, of which every `stride`-th element is stored, and the number of those.
fn distance(ours: &[f32], golden: &[f32], stride: usize, scale: impl Fn(usize) -> f64) -> (f64, f64) {
    let ours = ours.iter().step_by(stride).copied().map(f64::from);
    assert_eq!(ours.len(), golden.len());
    let off = l2(ours.zip(golden).map(|(o, &g)| o - f64::from(g)));
    (off, l2((0..golden.len()).map(scale)))
}

/// Name and stride of each tensor of a variant, with its entry in train.json and its index in our table.
fn for_each_tensor(case: &Case, variant: &Variant, mut check: impl FnMut(usize, &str, &Value)) {
    let tensors = variant.expected["tensors"].as_object().unwrap();
    let table = param_model::tensors(&case.config);
    assert_eq!(tensors.len(), table.len(), "{}/{}: number of tensors", case.name(), variant.name);
    for (i, spec) in table.iter().enumerate() {
        // Softmax does not see a shift of all scores: the gradient of the key's bias is zero but for rounding.
        if spec.part != Part::AttnKBias {
            check(i, &spec.checkpoint, &tensors[&spec.checkpoint]);
        }
    }
}

#[test]
fn every_gradient_equals_the_reference() {
    for_each_variant(|case, variant, at| {
        let golden = Checkpoint::open(&case.folder.join(format!("train_{}.safetensors", variant.name))).unwrap();
        let mut run = Run::new(case);
        run.gradients(variant);
        for_each_tensor(case, variant, |i, name, entry| {
            let want = golden.tensor(&format!("grad.{name}")).unwrap().expect(name).to_f32();
            let stride = entry["grad"]["stride"].as_u64().unwrap() as usize;
            let (off, size) = distance(&run.grads[i], &want, stride, |j| f64::from(want[j]));
            if size == 0.0 {
                assert_eq!(off, 0.0, "{at} gradient of {name}: the reference's is zero");
                return;
            }
            // The reference's own rounding, as a relative norm, tells whether 1e-4 can be asked for.
            let own = entry["grad_max_abs_err_f32_vs_f64"].as_f64().unwrap() * (want.len() as f64).sqrt() / size;
            let bound = if own < 1e-5 { 1e-4 } else { 1e-3 };
            assert!(off <= bound * size, "{at} gradient of {name}: off by {} of its norm, allowed {bound}", off / size);
            let norm = l2(run.grads[i].iter().copied().map(f64::from));
            assert_relative(&format!("{at} norm of the gradient of {name}"), norm, &entry["grad"]["l2"], bound);
        });
    });
}

#[test]
fn parameters_after_three_adamw_steps_equal_the_reference() {
    for_each_variant(|case, variant, at| {
        let golden = Checkpoint::open(&case.folder.join(format!("train_{}.safetensors", variant.name))).unwrap();
        if !golden.names().any(|n| n.starts_with("step3.")) {
            return;
        }
        let optimizer = &case.json("train.json")["optimizer"];
        let mut run = Run::new(case);
        let initial = run.params.clone();
        let mut moments = Moments { first: run.model.zeros(), second: run.model.zeros() };
        for t in 1..=3 {
            run.gradients(variant);
            let norm = global_norm(run.model.table_and_team().1, &run.grads);
            step_by(optimizer, &mut run, &mut moments, norm, t);
        }
        for_each_tensor(case, variant, |i, name, entry| {
            let want = golden.tensor(&format!("step3.{name}")).unwrap().expect(name).to_f32();
            let stride = entry["step3"]["stride"].as_u64().unwrap() as usize;
            let start = initial[i].iter().copied().step_by(stride).collect::<Vec<_>>();
            let (off, moved) = distance(&run.params[i], &want, stride, |j| f64::from(want[j]) - f64::from(start[j]));
            // Where a gradient is near zero Adam turns rounding into whole steps; the reference against itself in f64
            // says how far that carries.
            let own = entry["step3_max_abs_err_f32_vs_f64"].as_f64().unwrap() * (want.len() as f64).sqrt();
            assert!(off <= 1e-3 * moved + own, "{at} {name} after three steps: off by {} of the way", off / moved);
        });
    });
}

#[test]
fn evaluation_with_the_references_capacity_drops_the_same_choices() {
    for case in cases() {
        let arrays = case.arrays("eval.npz");
        let expected = case.json("eval.json");
        let ids = arrays["len64.input_ids"].ints.iter().map(|&id| id as u32).collect::<Vec<_>>();
        let sequences = Sequences { ids: &ids, n_col: ids.len(), mask: None, first: None };
        let capacity = Capacity::Factor { factor: case.config.eval_capacity, min: case.config.min_capacity };
        let mode = Mode { capacity, ..Mode::INFERENCE };
        let mut run = Run::new(&case);
        let positions = (0..ids.len()).collect::<Vec<_>>();
        let logits = run.model.logits(&run.params, sequences, &positions, mode);
        assert_close(&case.name(), &logits, &arrays["len64.logits_capacity2"].floats, 1e-4);
        let losses = run.model.loss(&run.params, sequences, &vec![0; ids.len()], mode);
        let moe = (0..case.config.n_layer).filter(|&i| case.config.is_moe(i));
        for (routing, layer) in losses.routings.iter().zip(moe) {
            let dropped = expected["capacity2"]["dropped"][layer.to_string()].as_u64().unwrap();
            assert_eq!(routing.n_dropped() as u64, dropped, "{} router {layer}", case.name());
        }
    }
}
