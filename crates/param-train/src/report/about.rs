//! What a run is, as its report's header says it.

use std::path::Path;

use param_model::Config;
use serde_json::Value;

use super::axis::{grouped, short};
use crate::data::Dataset;
use crate::settings::Settings;
use crate::trainer::Corpus;

/// Files of a corpus that are named.
const MAX_NAMED: usize = 8;

/// What stays the same while a run goes on.
pub struct About {
    /// Its folder's name.
    pub name: String,
    /// The model in a line.
    pub summary: String,
    /// Of the model: name and value.
    pub model: Vec<(String, String)>,
    /// Of what it trains on.
    pub data: Vec<(String, String)>,
    /// Every setting.
    pub settings: Vec<(String, String)>,
    /// Which of its blocks have experts.
    pub moe_blocks: Vec<usize>,
    /// Experts of each.
    pub n_expert: usize,
    /// Steps in all.
    pub total: u64,
    /// Largest gradient norm that is not scaled down.
    pub clip: f64,
}

impl About {
    /// Of the run in `folder`; `peak` is what the machine's operations a second can be at best.
    pub fn new(folder: &Path, config: &Config, settings: &Settings, corpus: &Corpus, peak: f64) -> Self {
        let datasets = corpus.train.datasets();
        let sources = datasets.iter().flat_map(|set| &set.part.shard().index().recipe.sources).collect::<Vec<_>>();
        let mut files = sources.iter().take(MAX_NAMED).map(|s| s.path.display().to_string()).collect::<Vec<_>>();
        if sources.len() > MAX_NAMED {
            files.push(format!("and {} more", grouped((sources.len() - MAX_NAMED) as u64)));
        }
        let share = |set: &Dataset| format!("{:.1}% from {}", 100.0 * set.weight, set.name);
        let shares = (datasets.len() > 1).then(|| datasets.iter().map(share).collect::<Vec<_>>().join("\n"));
        let mut data = vec![
            ("files".to_owned(), files.join("\n")),
            ("training tokens".to_owned(), grouped(corpus.train.n_token())),
            ("validation tokens".to_owned(), grouped(corpus.eval.n_token())),
            ("machine at best".to_owned(), format!("{} GFLOP/s", short(peak / 1e9))),
            ("param-train".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ];
        data.extend(shares.map(|shares| ("rows".to_owned(), shares)));
        // By way of the text, as only there an f32 has no more digits than it means.
        let json = serde_json::to_string(settings).expect("settings always serialise");
        Self {
            name: folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy().into_owned(),
            summary: summary(config),
            model: flat(&config.to_json()),
            data,
            settings: flat(&json),
            moe_blocks: config.moe_blocks().collect(),
            n_expert: config.n_expert,
            total: settings.schedule.total,
            clip: f64::from(settings.clip),
        }
    }
}

/// A model in a line.
pub fn summary(config: &Config) -> String {
    let n_params = param_model::tensors(config).iter().map(|t| t.n_elements()).sum::<usize>();
    let experts = match config.n_moe() {
        0 => "dense".to_owned(),
        n => format!("{n} of them with {} experts, top-{}", config.n_expert, config.n_expert_used),
    };
    format!(
        "{} parameters: {} blocks ({experts}), width {}, context {}, vocabulary {}",
        grouped(n_params as u64),
        config.n_layer,
        config.n_embd,
        config.n_ctx,
        grouped(config.n_vocab as u64),
    )
}

/// The leaves of a JSON text, each with the keys that lead to it.
fn flat(json: &str) -> Vec<(String, String)> {
    fn collect(key: &str, value: &Value, out: &mut Vec<(String, String)>) {
        match value {
            Value::Object(fields) => fields.iter().for_each(|(name, value)| {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                collect(&key, value, out);
            }),
            Value::String(text) => out.push((key.to_owned(), text.clone())),
            value => out.push((key.to_owned(), value.to_string())),
        }
    }
    let mut leaves = Vec::new();
    collect("", &serde_json::from_str(json).unwrap_or_default(), &mut leaves);
    leaves
}

#[cfg(test)]
mod tests {
    #[test]
    fn settings_are_named_by_the_keys_that_lead_to_them() {
        let leaves = super::flat(r#"{"seed": 7, "schedule": {"peak": 0.004, "curve": "cosine"}}"#);
        let leaves = leaves.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>();
        assert_eq!(leaves, ["schedule.curve=cosine", "schedule.peak=0.004", "seed=7"]);
    }
}
