//! Quality does not pay for speed: how far the kernels' distributions lie from those of f32 on the very same weights, for a model
//! trained on real text, our own sources, and read on text it has not seen.

use std::path::Path;
use std::sync::Arc;

use gguf::{GgmlType, Gguf, TensorInfo, Writer};
use param_runtime::{CacheType, Model, Rows, Session, SessionOptions};

use crate::command::{output_of, param_convert, param_train};

/// Trained: sharper than any random model, with routers that have decided. A width of 256 suits every type.
const FLAGS: &str = "--ext rs --preset param-tiny --set emb_dim=256 --set num_heads=4 --set num_layers=4 --set num_experts=4 \
    --vocab-size 512 --context 128 --batch-size 8 --steps 240 --optimizer adamw --lr 2e-3 --warmup 20 --threads 2 --sample-every 0 --eval-every 0";

/// Nats per token, on average.
const BOUND: f64 = 1e-4;

/// The same model with every tensor as the f32 it stands for.
fn dequantized(file: &Gguf) -> Arc<Model> {
    let as_f32 = |info: &TensorInfo| {
        let dims = info.shape().iter().rev().copied().collect();
        TensorInfo::new(info.name.as_str(), dims, GgmlType::F32).unwrap()
    };
    let infos = file.tensors().iter().map(as_f32).collect();
    let mut writer = Writer::new(Vec::new(), file.metadata(), infos).unwrap();
    for info in file.tensors() {
        let mut values = vec![0.0f32; info.n_elements() as usize];
        param_ggml::dequantize(info.ty, file.tensor_data(&info.name).unwrap(), &mut values).unwrap();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        writer.append(&info.name, &bytes).unwrap();
    }
    Model::from_gguf(Gguf::from_bytes(writer.finish().unwrap()).unwrap()).unwrap()
}

/// Log probabilities after each token.
fn log_probabilities(model: &Arc<Model>, tokens: &[u32], cache: CacheType) -> Vec<Vec<f64>> {
    let options = SessionOptions { cache_type: Some(cache), ..SessionOptions::default() };
    let mut session = Session::new(model, &options).unwrap();
    session.push(tokens).unwrap();
    let logits = session.forward(Rows::All).unwrap();
    let log_softmax = |logits: &[f32]| {
        let max = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
        let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
        logits.iter().map(|&l| f64::from(l) - max - sum.ln()).collect()
    };
    logits.chunks_exact(model.config().n_vocab).map(log_softmax).collect()
}

#[test]
fn kernels_lose_less_than_1e_4_nats_per_token_against_f32_on_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates");
    // Crates that seldom change: the divergence depends on what the model becomes.
    let data = ["gguf", "param-model"].map(|name| crates.join(name).join("src"));
    output_of(param_train().arg("--data").args(data).arg("--out").arg(&run).args(FLAGS.split_whitespace()));
    let unseen = std::fs::read_to_string(crates.join("param-runtime/src/forward.rs")).unwrap();
    for quant in ["default", "q8_0", "q6_k", "q4_k", "q4_0", "f16", "bf16"] {
        let path = folder.path().join("model.gguf");
        let mut convert = param_convert();
        convert.arg(&run).arg(&path);
        if quant != "default" {
            convert.args(["--quant", quant]);
        }
        output_of(&mut convert);
        let model = Model::open(&path).unwrap();
        let reference = dequantized(model.gguf());
        let tokens = model.encode(&unseen).unwrap();
        let (mut divergence, mut entropy, mut n) = (0.0, 0.0, 0.0);
        for tokens in tokens.chunks(128) {
            let want = log_probabilities(&reference, tokens, CacheType::F32);
            let got = log_probabilities(&model, tokens, CacheType::F16);
            for (want, got) in want.iter().zip(&got) {
                divergence += want.iter().zip(got).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
                entropy -= want.iter().map(|p| p * p.exp()).sum::<f64>();
                n += 1.0;
            }
        }
        println!("{quant}: {:.2e} nats per token over {n} tokens of entropy {:.2}", divergence / n, entropy / n);
        // A model that had learned nothing would be near ln 512 = 6.2, and easy to be close to.
        assert!(entropy / n < 4.5, "{quant}: entropy {}", entropy / n);
        assert!(divergence >= 0.0 && divergence / n < BOUND, "{quant}: {:e} nats per token", divergence / n);
        std::fs::remove_file(&path).unwrap();
    }
}
