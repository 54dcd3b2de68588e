//! Parquet files as rows of text: one column, page by page, so that no row group is ever held whole.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parquet::basic::{ConvertedType, LogicalType, Type};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::ColumnDescriptor;

use super::DataError;
use super::read::Content;
use super::report::Reason;
use super::source::{Compression, SourceFile};

/// The text column of one file being read.
pub struct ParquetFile {
    file: SerializedFileReader<File>,
    /// Index of the text column among the columns, a struct's fields each by itself.
    column: usize,
    optional: bool,
    size: u64,
    disk_bytes: Arc<AtomicU64>,
    /// Bytes of the file counted in `disk_bytes`.
    counted: u64,
    /// Index of the row group to open when `rows` is at its end.
    next_group: usize,
    rows: Option<ColumnReaderImpl<ByteArrayType>>,
    /// The row group opened last ends here, in damage not yet told of.
    damaged: bool,
    /// Number of the next row in the file, from 1.
    row: u64,
}

/// The text of a row, not yet checked to be UTF-8; `None` for null.
pub type Row = Option<ByteArray>;

impl ParquetFile {
    /// Opens a file at the first of its row groups that lies at byte `offset` or after.
    ///
    /// # Errors
    /// [`DataError::Parquet`] if it is no Parquet file or cut short, [`DataError::NoColumn`], [`DataError::ColumnType`].
    pub fn open(source: &SourceFile, field: &str, offset: u64, disk_bytes: Arc<AtomicU64>) -> Result<Self, DataError> {
        let path = source.path.clone();
        let refused = |problem: String| DataError::Parquet { path: path.clone(), problem };
        if source.compression != Compression::None {
            return Err(refused("is packed as a whole: unpack it first (Parquet packs its columns itself)".to_owned()));
        }
        let file = File::open(&path).map_err(|e| DataError::read(&path, e))?;
        let file = guarded(|| SerializedFileReader::new(file)).map_err(|e| refused(format!("cannot be read: {e}")))?;
        let columns = file.metadata().file_metadata().schema_descr().columns();
        let Some(column) = columns.iter().position(|c| c.path().string() == field) else {
            let columns = columns.iter().map(|c| format!("`{}`", c.path().string())).collect::<Vec<_>>().join(", ");
            return Err(DataError::NoColumn { path, field: field.to_owned(), columns });
        };
        let descriptor = &columns[column];
        if !is_text(descriptor) {
            let found = describe(descriptor);
            return Err(DataError::ColumnType { path, field: field.to_owned(), found });
        }
        let optional = descriptor.max_def_level() > 0;
        let groups = file.metadata().row_groups();
        let next_group = groups.iter().position(|group| start(group) >= offset).unwrap_or(groups.len());
        let row = 1 + rows(&groups[..next_group]);
        let size = source.size;
        Ok(Self { file, column, optional, size, disk_bytes, counted: 0, next_group, rows: None, damaged: false, row })
    }

    /// Where row groups begin, in bytes.
    pub fn row_groups(&self) -> Vec<u64> {
        self.file.metadata().row_groups().iter().map(start).collect()
    }

    /// The next rows, of about `block` bytes together, and whether the file ends with them.
    pub fn next_block(&mut self, block: usize) -> Result<(Content, bool), DataError> {
        if self.damaged {
            return Ok(self.damaged_group());
        }
        let first_row = self.row;
        let (mut texts, mut n_byte) = (Vec::<Row>::new(), 0);
        while n_byte < block {
            let Some(rows) = &mut self.rows else {
                // A block ends with its row group, so that one damaged at its start is named for itself.
                if !texts.is_empty() || self.next_group == self.n_group() {
                    break;
                }
                let opened = self.open_group();
                self.next_group += 1;
                match opened {
                    Ok(rows) => self.rows = Some(rows),
                    Err(_) => return Ok(self.damaged_group()),
                }
                continue;
            };
            let optional = self.optional;
            match guarded(|| next_row(rows, optional)) {
                Ok(Some(row)) => {
                    // An empty text costs a few bytes as well.
                    n_byte += size_of::<Row>() + row.as_ref().map_or(0, ByteArray::len);
                    texts.push(row);
                    self.row += 1;
                }
                Ok(None) => self.rows = None,
                Err(_) if texts.is_empty() => return Ok(self.damaged_group()),
                Err(_) => {
                    self.damaged = true;
                    break;
                }
            }
        }
        let ends_file = self.rows.is_none() && self.next_group == self.n_group();
        self.count_bytes(ends_file);
        Ok((Content::Rows { first_row, texts, n_byte }, ends_file))
    }

    /// Leaves the row group that was opened last, at its damage.
    fn damaged_group(&mut self) -> (Content, bool) {
        let number = self.next_group as u64;
        (self.rows, self.damaged) = (None, false);
        self.row = 1 + rows(&self.file.metadata().row_groups()[..self.next_group]);
        let ends_file = self.next_group == self.n_group();
        self.count_bytes(ends_file);
        (Content::Bad(Reason::BadRowGroup, number), ends_file)
    }

    fn open_group(&self) -> Result<ColumnReaderImpl<ByteArrayType>, ParquetError> {
        let column = self.column;
        let metadata = self.file.metadata().row_group(self.next_group).column(column);
        let within = |offset: i64| u64::try_from(offset).is_ok_and(|offset| offset < self.size);
        if !within(metadata.data_page_offset())
            || metadata.dictionary_page_offset().is_some_and(|offset| !within(offset))
            || u64::try_from(metadata.compressed_size()).is_ok_and(|len| len > self.size)
        {
            return Err(ParquetError::General("lies outside the file".to_owned()));
        }
        guarded(|| match self.file.get_row_group(self.next_group)?.get_column_reader(column)? {
            ColumnReader::ByteArrayColumnReader(rows) => Ok(rows),
            _ => Err(ParquetError::General("another type than the schema's".to_owned())),
        })
    }

    fn n_group(&self) -> usize {
        self.file.metadata().num_row_groups()
    }

    /// Progress goes by rows: which bytes are read is the crate's affair.
    fn count_bytes(&mut self, all: bool) {
        let n_row = rows(self.file.metadata().row_groups()).max(1);
        let share = (self.row - 1).min(n_row) as f64 / n_row as f64;
        let read = if all { self.size } else { (self.size as f64 * share) as u64 };
        self.disk_bytes.fetch_add(read.saturating_sub(self.counted), Ordering::Relaxed);
        self.counted = read.max(self.counted);
    }
}

/// One value, so that no more than a page is unpacked ahead; `None` at the end.
fn next_row(rows: &mut ColumnReaderImpl<ByteArrayType>, optional: bool) -> Result<Option<Row>, ParquetError> {
    let (mut level, mut value) = (Vec::new(), Vec::new());
    let (n_row, _, _) = rows.read_records(1, optional.then_some(&mut level), None, &mut value)?;
    Ok((n_row > 0).then(|| value.pop()))
}

/// Some files that lie about themselves make the crate panic: to whoever reads it, that file is damaged like any other.
fn guarded<T>(read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, ParquetError> {
    let panicked = |_| Err(ParquetError::General("it contradicts itself".to_owned()));
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(panicked)
}

/// Strings, or bytes of which nothing is said: they are checked to be UTF-8 like any text.
fn is_text(column: &ColumnDescriptor) -> bool {
    let by_name = match column.logical_type_ref() {
        None => matches!(column.converted_type(), ConvertedType::NONE | ConvertedType::UTF8),
        Some(logical) => *logical == LogicalType::String,
    };
    column.physical_type() == Type::BYTE_ARRAY && column.max_rep_level() == 0 && by_name
}

fn describe(column: &ColumnDescriptor) -> String {
    let list = if column.max_rep_level() > 0 { "a list of " } else { "" };
    match column.logical_type_ref() {
        Some(logical) => format!("{list}{} ({logical:?})", column.physical_type()),
        None => format!("{list}{}", column.physical_type()),
    }
}

/// Where a row group begins, as far as can be told.
fn start(group: &RowGroupMetaData) -> u64 {
    let first = group.columns().first();
    first.map_or(0, |c| c.dictionary_page_offset().unwrap_or(c.data_page_offset()).max(0) as u64)
}

/// Rows of row groups, by what they say of themselves.
fn rows(groups: &[RowGroupMetaData]) -> u64 {
    groups.iter().fold(0u64, |sum, group| sum.saturating_add(group.num_rows().max(0) as u64)).min(i64::MAX as u64)
}
