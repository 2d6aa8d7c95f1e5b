const table = document.querySelector("#fleet table"), rows = [...table.tBodies]
const form = document.querySelector("#choose"), heads = [...table.tHead.rows[0].cells]
const text = (row, column) => row.rows[0].cells[column].textContent

function choose() {
  const wanted = form.elements.text.value.toLowerCase(), verdict = form.elements.verdict.value
  for (const row of rows)
    row.hidden = !row.textContent.toLowerCase().includes(wanted) || (verdict !== "" && text(row, 0) !== verdict)
  const shown = rows.filter(row => !row.hidden).length
  form.querySelector("output").value = `${shown} of ${rows.length}`
}

function sort(column) {
  const head = heads[column], turned = head.ariaSort === "ascending" ? -1 : 1, numbers = head.className === "n"
  for (const other of heads) other.ariaSort = null
  head.ariaSort = turned === 1 ? "ascending" : "descending"
  const key = row => numbers ? (text(row, column) === "" ? Infinity : Number(text(row, column))) : text(row, column)
  const compare = (a, b) => numbers ? (a === b ? 0 : a - b) : a.localeCompare(b)
  table.append(...[...rows].sort((a, b) => turned * compare(key(a), key(b))))
}

heads.forEach((head, column) => {
  const button = document.createElement("button")
  button.textContent = head.textContent
  button.addEventListener("click", () => sort(column))
  head.replaceChildren(button)
})
form.addEventListener("input", choose)
form.addEventListener("submit", event => event.preventDefault())
choose()
