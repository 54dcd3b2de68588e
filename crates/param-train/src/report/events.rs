//! TensorBoard's event files: protobuf messages in TFRecord frames, one message for each record of the run.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::{Message, Oneof};
use serde_json::Value;

use crate::error::Error;
use crate::metrics::{Fields, Kind};

/// Folder of the event files within a run's folder.
pub const EVENTS_FOLDER: &str = "tensorboard";
/// TensorBoard takes for an event file what has this in its name, and reads such files in the order of their names.
const PREFIX: &str = "events.out.tfevents.";

/// An event file, open for appending. Every message is written as it comes, in one call and without a buffer of ours: a live
/// TensorBoard sees it at once, and a kill leaves at most the last frame cut short, which readers take for the end.
pub struct EventFile {
    path: PathBuf,
    file: fs::File,
    /// Which of the model's blocks the MoE blocks are.
    moe_blocks: Vec<usize>,
}

impl EventFile {
    /// Begins the next event file of the run in `folder`, which has done `step` steps. Files of earlier sittings stay as they
    /// are, as a TensorBoard may be reading them; it forgets what they say of later steps, which the run goes through again.
    pub fn create(folder: &Path, step: u64, moe_blocks: Vec<usize>) -> Result<Self, Error> {
        let folder = folder.join(EVENTS_FOLDER);
        let make = || -> io::Result<(PathBuf, fs::File)> {
            fs::create_dir_all(&folder)?;
            let mut second = seconds_since_epoch() as u64;
            for entry in fs::read_dir(&folder)? {
                let name = entry?.file_name();
                let older = name.to_str().and_then(|n| n.strip_prefix(PREFIX)?.split('.').next()?.parse::<u64>().ok());
                second = second.max(older.map_or(0, |older| older + 1));
            }
            let host = gethostname::gethostname().to_string_lossy().into_owned();
            let path = folder.join(format!("{PREFIX}{second:010}.{host}.param"));
            let file = OpenOptions::new().append(true).create_new(true).open(&path)?;
            Ok((path, file))
        };
        let (path, file) = make().map_err(|error| Error::Io { path: folder.clone(), error })?;
        let mut events = Self { path, file, moe_blocks };
        // Purging goes by the session log only in files of this version.
        events.write(0, What::FileVersion("brain.Event:2".to_owned()))?;
        events.write(step as i64 + 1, What::SessionLog(SessionLog { status: SESSION_START }))?;
        Ok(events)
    }

    /// Appends what a record of the run says.
    pub fn record(&mut self, step: u64, kind: Kind, fields: &Fields) -> Result<(), Error> {
        let mut value = Vec::new();
        for (field, content) in fields.iter().filter(|(field, _)| *field != "step") {
            match kind {
                Kind::Step => self.collect(field, content, &mut value),
                Kind::Evaluation => {
                    let name = field.strip_prefix("eval_").unwrap_or(field);
                    value.extend(content.as_f64().map(|x| scalar(format!("eval/{name}"), x)));
                }
                Kind::Sample => value.extend(content.as_str().map(|text| text_value(field, text))),
                // The loads show it.
                Kind::Starved => return Ok(()),
            }
        }
        self.write(step as i64, What::Summary(Summary { value }))
    }

    /// The scalars of a step's field: one number of the step, one of each MoE block, or one of each expert.
    fn collect(&self, field: &str, content: &Value, out: &mut Vec<SummaryValue>) {
        if let Some(x) = content.as_f64() {
            out.push(scalar(format!("train/{field}"), x));
        }
        for (block, content) in self.moe_blocks.iter().zip(content.as_array().into_iter().flatten()) {
            out.extend(content.as_f64().map(|x| scalar(format!("{field}/block_{block}"), x)));
            for (expert, content) in content.as_array().into_iter().flatten().enumerate() {
                out.extend(content.as_f64().map(|x| scalar(format!("{field}/block_{block}/expert_{expert}"), x)));
            }
        }
    }

    fn write(&mut self, step: i64, what: What) -> Result<(), Error> {
        let event = Event { wall_time: seconds_since_epoch(), step, what: Some(what) };
        let framed = frame(&event.encode_to_vec());
        self.file.write_all(&framed).map_err(|error| Error::Io { path: self.path.clone(), error })
    }
}

fn scalar(tag: String, x: f64) -> SummaryValue {
    SummaryValue { tag, metadata: None, value: Some(Content::SimpleValue(x as f32)) }
}

fn text_value(tag: &str, text: &str) -> SummaryValue {
    // TensorBoard shows Markdown, where what is indented by four is shown as it is.
    let as_is = text.lines().map(|line| format!("    {line}\n")).collect::<String>();
    let plugin_data = Some(PluginData { plugin_name: "text".to_owned() });
    let tensor = Tensor { dtype: DT_STRING, shape: Some(Shape {}), string_val: vec![as_is.into_bytes()] };
    SummaryValue {
        tag: tag.to_owned(),
        metadata: Some(Metadata { plugin_data, data_class: DATA_CLASS_TENSOR }),
        value: Some(Content::Tensor(tensor)),
    }
}

fn seconds_since_epoch() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// A TFRecord: length, its checksum, payload, its checksum, all little-endian.
fn frame(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let masked = |bytes: &[u8]| masked_crc(bytes).to_le_bytes();
    [&length[..], &masked(&length), payload, &masked(payload)].concat()
}

/// CRC-32C, rotated and offset as in TFRecord, so that a checksum of checksums is none of the usual values.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

// What we write of TensorBoard's messages (tensorboard/compat/proto: event, summary, tensor); field numbers are theirs.

const SESSION_START: i32 = 1;
const DT_STRING: i32 = 7;
const DATA_CLASS_TENSOR: i32 = 2;

#[derive(Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[derive(Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

#[derive(Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
    #[prost(oneof = "Content", tags = "2, 8")]
    value: Option<Content>,
}

#[derive(Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    SimpleValue(f32),
    #[prost(message, tag = "8")]
    Tensor(Tensor),
}

#[derive(Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<PluginData>,
    #[prost(int32, tag = "4")]
    data_class: i32,
}

#[derive(Message)]
struct PluginData {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

#[derive(Message)]
struct Tensor {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string_val: Vec<Vec<u8>>,
}

/// Without dimensions: that of a single value.
#[derive(Message)]
struct Shape {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_carry_the_masked_crc32c() {
        // CRC-32C of "123456789" is the check value of the algorithm's catalogue entry.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xE306_9283);
        let framed = frame(b"123456789");
        assert_eq!(framed.len(), 8 + 4 + 9 + 4);
        assert_eq!(framed[..8], [9, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(framed[12..21], *b"123456789");
        assert_eq!(framed[21..], 0xC78A_B0E5_u32.to_le_bytes());
        // The header with which every file of TensorFlow's begins: a version event of 24 bytes.
        assert_eq!(frame(&[0; 24])[8..12], [0xA3, 0x7F, 0x4B, 0x22]);
    }

    #[test]
    fn a_file_begun_in_the_same_second_comes_after_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let names = (0..3).map(|step| {
            let path = EventFile::create(folder.path(), step, Vec::new()).unwrap().path;
            path.file_name().unwrap().to_str().unwrap().to_owned()
        });
        let names = names.collect::<Vec<_>>();
        assert!(names.is_sorted_by(|a, b| a < b), "{names:?}");
    }
}
