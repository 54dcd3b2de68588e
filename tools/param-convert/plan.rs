//! What becomes of each tensor: its type by its role, by the command line, and by what the length of its rows allows.

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::{Result, bail};
use gguf::{GgmlType, TensorInfo};
use param::cli::Usage;
use param_model::{Config, Role, TensorSpec};
use regex::Regex;

/// The types that a model can be converted to, with the numbers that llama.cpp gives to files made mostly of them.
const FILE_TYPES: [(GgmlType, u32); 15] = [
    (GgmlType::F32, 0),
    (GgmlType::F16, 1),
    (GgmlType::BF16, 32),
    (GgmlType::Q8_0, 7),
    (GgmlType::Q6_K, 18),
    (GgmlType::Q5_K, 16),
    (GgmlType::Q4_K, 14),
    (GgmlType::Q3_K, 11),
    (GgmlType::Q2_K, 10),
    (GgmlType::Q5_0, 8),
    (GgmlType::Q5_1, 9),
    (GgmlType::Q4_0, 2),
    (GgmlType::Q4_1, 3),
    (GgmlType::IQ4_NL, 25),
    (GgmlType::IQ4_XS, 30),
];

/// The types' names as the command line takes them.
pub fn known_types() -> String {
    FILE_TYPES.map(|(ty, _)| ty.name().to_lowercase()).join(", ")
}

/// A type that a model can be converted to, by its name in any case.
pub fn parse_type(name: &str) -> Result<GgmlType, String> {
    let ty = name.parse().ok().filter(|ty| FILE_TYPES.iter().any(|(known, _)| known == ty));
    ty.ok_or_else(|| format!("unknown type: expected one of {}", known_types()))
}

/// One `--tensor-type`.
#[derive(Clone, Debug)]
pub struct Override {
    regex: Regex,
    ty: GgmlType,
}

impl Override {
    /// Whether the name matches. A quantized type passes over what is never quantized, so that `ffn_up_exps=q6_k` may
    /// match the experts' biases too.
    fn applies_to(&self, spec: &TensorSpec) -> bool {
        let storable = spec.is_matrix() || self.ty.block_size() == 1;
        storable && spec.gguf.as_ref().is_some_and(|name| self.regex.is_match(name))
    }
}

impl FromStr for Override {
    type Err = String;

    fn from_str(text: &str) -> Result<Override, String> {
        let (regex, ty) = text.rsplit_once('=').ok_or("expected REGEX=TYPE")?;
        Ok(Override { regex: Regex::new(regex).map_err(|e| e.to_string())?, ty: parse_type(ty)? })
    }
}

/// One tensor of the file to write.
pub struct Entry {
    pub spec: TensorSpec,
    pub info: TensorInfo,
    /// The type asked for, where its blocks do not fit the rows.
    pub unfit: Option<GgmlType>,
}

/// All tensors of the file to write, in order.
pub struct Plan {
    pub entries: Vec<Entry>,
}

impl Plan {
    pub fn new(config: &Config, quant: Option<GgmlType>, overrides: &[Override]) -> Result<Plan> {
        let mut entries = Vec::new();
        for spec in param_model::tensors(config) {
            let Some(name) = spec.gguf.clone() else { continue };
            let chosen = overrides.iter().rfind(|o| o.applies_to(&spec));
            let wanted = chosen.map_or_else(|| by_role(&spec, quant), |o| o.ty);
            let ne: Vec<u64> = spec.gguf_shape().iter().rev().map(|&dim| dim as u64).collect();
            let ty = fitting(wanted, ne[0]);
            let info = TensorInfo::new(name, ne, ty)?;
            entries.push(Entry { spec, info, unfit: (ty != wanted).then_some(wanted) });
        }
        for o in overrides {
            if !entries.iter().any(|entry: &Entry| o.applies_to(&entry.spec)) {
                let found = if entries.iter().any(|entry| o.regex.is_match(&entry.info.name)) {
                    "matches only norms, routers, biases or positions, which take f32, f16 or bf16"
                } else {
                    "matches no tensor; names are like `blk.0.ffn_up_exps.weight`"
                };
                bail!(Usage(format!("--tensor-type: `{}` {found}", o.regex)));
            }
        }
        Ok(Plan { entries })
    }

    pub fn n_elements(&self) -> u64 {
        self.entries.iter().map(|entry| entry.info.n_elements()).sum()
    }

    /// llama.cpp's number for the type that most of the file's weights have.
    pub fn file_type(&self) -> u32 {
        let mut n_elements = BTreeMap::new();
        for Entry { info, .. } in &self.entries {
            *n_elements.entry(info.ty).or_insert(0) += info.n_elements();
        }
        let most = n_elements.into_iter().max_by_key(|&(_, n)| n).map(|(ty, _)| ty);
        FILE_TYPES.iter().find(|&&(ty, _)| Some(ty) == most).map_or(0, |&(_, number)| number)
    }

    /// Number of weights as people say it, such as `477M`.
    pub fn size_label(&self) -> String {
        let n = self.n_elements() as f64;
        let (scaled, unit) = [(1e9, "B"), (1e6, "M"), (1e3, "K")]
            .into_iter()
            .find(|(unit, _)| n >= *unit)
            .map_or((n, ""), |(unit, name)| (n / unit, name));
        let digits = usize::from(scaled < 10.0 && !unit.is_empty());
        format!("{scaled:.digits$}{unit}")
    }
}

fn by_role(spec: &TensorSpec, quant: Option<GgmlType>) -> GgmlType {
    match spec.role {
        Role::Expert => quant.unwrap_or(GgmlType::Q4_K),
        _ if spec.is_matrix() => quant.unwrap_or(GgmlType::Q8_0),
        _ => GgmlType::F32,
    }
}

/// The type itself, or the nearest whose blocks fit rows of `n_per_row`: the same fallbacks as llama.cpp's.
fn fitting(wanted: GgmlType, n_per_row: u64) -> GgmlType {
    if wanted.row_size(n_per_row).is_some() {
        return wanted;
    }
    let narrower = match wanted {
        GgmlType::Q2_K | GgmlType::Q3_K => GgmlType::Q4_0,
        GgmlType::Q4_K => GgmlType::Q5_0,
        GgmlType::Q5_K => GgmlType::Q5_1,
        GgmlType::Q6_K => GgmlType::Q8_0,
        GgmlType::IQ4_XS => GgmlType::IQ4_NL,
        _ => GgmlType::F16,
    };
    fitting(narrower, n_per_row)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(preset: &str, quant: Option<GgmlType>, overrides: &[&str]) -> Result<Plan> {
        let overrides: Vec<Override> = overrides.iter().map(|text| text.parse().unwrap()).collect();
        Plan::new(&Config::preset(preset)?, quant, &overrides)
    }

    fn ty(plan: &Plan, name: &str) -> GgmlType {
        plan.entries.iter().find(|entry| entry.info.name == name).unwrap().info.ty
    }

    #[test]
    fn every_type_offered_can_be_written() {
        assert!(FILE_TYPES.iter().all(|&(ty, _)| param_ggml::can_quantize(ty)));
        assert_eq!(GgmlType::all().filter(|&ty| param_ggml::can_quantize(ty)).count(), FILE_TYPES.len());
    }

    #[test]
    fn experts_are_q4_k_other_matrices_q8_0_and_the_rest_f32() {
        let plan = plan("param-0.5b", None, &[]).unwrap();
        for entry in &plan.entries {
            let expected = match entry.spec.role {
                Role::Expert => GgmlType::Q4_K,
                Role::TokenEmbedding | Role::Attention | Role::FeedForward => GgmlType::Q8_0,
                Role::PositionEmbedding | Role::Router | Role::Norm | Role::Bias => GgmlType::F32,
            };
            assert_eq!((entry.info.ty, entry.unfit), (expected, None), "{}", entry.info.name);
        }
        assert!(!plan.entries.iter().any(|entry| entry.spec.checkpoint.contains("w_noise")));
        assert_eq!(plan.file_type(), 14);
        assert_eq!(plan.size_label(), "477M");
    }

    #[test]
    fn one_type_is_for_all_matrices() {
        let f32 = plan("param-0.5b", Some(GgmlType::F32), &[]).unwrap();
        assert!(f32.entries.iter().all(|entry| entry.info.ty == GgmlType::F32));
        assert_eq!(f32.file_type(), 0);
        let q6_k = plan("param-0.5b", Some(GgmlType::Q6_K), &[]).unwrap();
        assert!(q6_k.entries.iter().all(|e| e.spec.is_matrix() == (e.info.ty == GgmlType::Q6_K)));
    }

    #[test]
    fn the_last_override_that_matches_decides() {
        let plan = plan("param-0.5b", None, &["_exps.weight=q2_k", r"^blk\.0\.ffn_up=q6_k", "attn_norm=bf16"]).unwrap();
        assert_eq!(ty(&plan, "blk.0.ffn_up_exps.weight"), GgmlType::Q6_K);
        assert_eq!(ty(&plan, "blk.0.ffn_down_exps.weight"), GgmlType::Q2_K);
        assert_eq!(ty(&plan, "blk.2.ffn_up_exps.weight"), GgmlType::Q2_K);
        assert_eq!(ty(&plan, "blk.0.ffn_up_exps.bias"), GgmlType::F32);
        assert_eq!(ty(&plan, "blk.2.attn_norm.bias"), GgmlType::BF16);
    }

    #[test]
    fn overrides_that_match_nothing_or_vectors_say_so() {
        let message = |text| plan("param-0.5b", None, &[text]).err().unwrap().to_string();
        assert!(message("ffn_gate_exps=q4_0").contains("`ffn_gate_exps` matches no tensor"));
        assert!(message("ffn_norm=q8_0").contains("`ffn_norm` matches only norms"));
        assert!(message("ffn_gate_inp=q8_0").contains("routers"));
    }

    #[test]
    fn overrides_are_parsed_from_the_last_equals_sign() {
        assert_eq!("a=b=Q4_K".parse::<Override>().unwrap().regex.as_str(), "a=b");
        assert_eq!("q4_k".parse::<Override>().unwrap_err(), "expected REGEX=TYPE");
        assert!("(=q4_k".parse::<Override>().unwrap_err().contains("unclosed group"));
        assert!("a=q9".parse::<Override>().unwrap_err().contains("expected one of f32, f16, bf16, q8_0"));
        assert!("a=iq1_s".parse::<Override>().is_err());
    }

    #[test]
    fn short_rows_fall_back_as_in_llama_cpp() {
        use GgmlType::*;
        let fallbacks = [(Q2_K, Q4_0), (Q3_K, Q4_0), (Q4_K, Q5_0), (Q5_K, Q5_1), (Q6_K, Q8_0), (IQ4_XS, IQ4_NL)];
        for (wanted, expected) in fallbacks {
            assert_eq!(fitting(wanted, 96), expected);
            assert_eq!(fitting(wanted, 24), F16);
            assert_eq!(fitting(wanted, 512), wanted);
        }
        assert_eq!(fitting(Q8_0, 24), F16);
        assert_eq!(fitting(BF16, 24), BF16);
    }
}
